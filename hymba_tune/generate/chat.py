"""A conversation with a model, or the same one with several."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import set_seed

from hymba_tune.checkpoint import check_length
from hymba_tune.config import ChatConfig
from hymba_tune.data import Conversation, Message, encode_prompt
from hymba_tune.errors import ConfigError
from hymba_tune.generate.answers import answer
from hymba_tune.generate.opening import LoadableModel, find_model
from hymba_tune.inputs import check_inputs

Hear = Callable[[str], None]
"""Called with each piece of an answer as it is written."""


class Chat:
    """A conversation with a model.

    Args:
        config: Which model, and how it answers.
        on_note: Called with what is worth knowing, once.
        found: The model, where it has been found already.

    Raises:
        HymbaTuneError: If the model cannot be found or loaded.
    """

    def __init__(
        self, config: ChatConfig, on_note: Callable[[str], None] = lambda _: None, found: LoadableModel | None = None
    ) -> None:
        found = found or find_model(config.model, config)
        self.name = found.source.name
        self._config = config
        self._on_note: Callable[[str], None] | None = on_note
        self._tokenizer = found.tokenizer
        if note := found.note:
            on_note(note)
        self._model = found.load()
        self._system = config.system
        self._messages: list[Message] = []
        if config.seed is not None:
            set_seed(config.seed)

    @property
    def messages(self) -> Sequence[Message]:
        """What was said so far, the system prompt first if there is one."""
        return [*([Message("system", self._system)] if self._system else []), *self._messages]

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self._messages = []

    def undo(self) -> bool:
        """Take the last question and its answer back; False if nothing was said."""
        said = bool(self._messages)
        self._messages = self._messages[:-2]
        return said

    def use_system(self, prompt: str | None) -> None:
        """Put another system prompt in front of what was said, or none."""
        self._system = prompt

    def ask(self, text: str, on_text: Hear | None = None) -> str:
        """Say something, and get the model's answer to all that was said so far.

        Args:
            text: What the user says.
            on_text: Called with each piece of the answer as it is written.

        Raises:
            ConfigError: If it is to be strict about lengths, and the longest answer would not fit.
        """
        conversation = Conversation((*self.messages, Message("user", text)))
        self._check_length(conversation)
        said = answer(
            self._model,
            self._tokenizer,
            conversation,
            max_new_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            on_text=on_text,
        )
        # Kept only now, so that an interrupted answer leaves the conversation as it was.
        self._messages += [Message("user", text), Message("assistant", said)]
        return said

    def _check_length(self, conversation: Conversation) -> None:
        strict, tokens = self._config.strict_length, len(encode_prompt(conversation, self._tokenizer))
        longest = tokens + self._config.max_new_tokens if strict else tokens
        warning = check_length(longest, self._model.config, strict=strict)
        if warning and self._on_note:
            self._on_note(warning)
            self._on_note = None


class ChatSession:
    """The same conversation with one model or with several, and what can be done to it between two questions.

    Args:
        config: Which models, and how they answer.
        on_note: Called with what is worth knowing.

    Raises:
        HymbaTuneError: If a model cannot be found or loaded.
    """

    def __init__(self, config: ChatConfig, on_note: Callable[[str], None] = lambda _: None) -> None:
        check_inputs(config)
        names = dict.fromkeys([config.model, *config.against])
        every = [find_model(name, config) for name in names]  # before the first is loaded: that takes long
        self.chats = [Chat(config, on_note, found) for found in every]
        self._commands: dict[str, tuple[str, Callable[[str], str]]] = {
            "/undo": ("take the last question and its answer back", self._undo),
            "/reset": ("start over; the system prompt stays", self._reset),
            "/system": ("TEXT: another system prompt; without TEXT, none", self._system),
            "/history": ("show what was said", self._history),
            "/save": ("FILE: put the conversation behind what FILE (.jsonl) holds, as a row to train on", self._save),
            "/help": ("show this", self._help),
        }

    def ask(
        self,
        text: str,
        on_text: Hear,
        *,
        on_begin: Callable[[str], None] = lambda _: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Ask every model the same, one after the other. An interruption takes the question back from all of them.

        Args:
            text: What the user says.
            on_text: Called with each piece of each answer.
            on_begin: Called with a model's name before it answers.
            on_end: Called when it has answered, or was interrupted.
        """
        answered: list[Chat] = []
        try:
            for chat in self.chats:
                on_begin(chat.name)
                try:
                    chat.ask(text, on_text)
                finally:
                    on_end()
                answered.append(chat)
        except BaseException:
            for chat in answered:
                chat.undo()
            raise

    def command(self, line: str) -> str:
        """Do what a line that begins with / asks for, and say what was done.

        Raises:
            ConfigError: If there is no such command, or it cannot be done.
        """
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ConfigError(f"There is no {name} here.", expected=", ".join(["/quit", *self._commands]))
        return self._commands[name][1](rest.strip())

    def _undo(self, _: str) -> str:
        undone = [chat.undo() for chat in self.chats]
        return "taken back" if any(undone) else "nothing was said yet"

    def _reset(self, _: str) -> str:
        for chat in self.chats:
            chat.reset()
        return "started over"

    def _system(self, prompt: str) -> str:
        for chat in self.chats:
            chat.use_system(prompt or None)
        return f"system prompt: {prompt or 'none'}"

    def _history(self, _: str) -> str:
        told = []
        for chat in self.chats:
            head = [f"{chat.name}:"] if len(self.chats) > 1 else []
            told += [*head, *(f"{message.role}: {message.content}" for message in chat.messages)]
        return "\n".join(told) or "nothing was said yet"

    def _save(self, file: str) -> str:
        if not file.endswith(".jsonl"):
            raise ConfigError(f"/save {file}: where to?", expected="/save FILE.jsonl")
        talks = [chat.messages for chat in self.chats if chat.messages[-1:] and chat.messages[-1].role == "assistant"]
        rows = [{"messages": [{"role": m.role, "content": m.content} for m in messages]} for messages in talks]
        if not rows:
            return "nothing was said yet"
        try:
            with Path(file).expanduser().open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise ConfigError(f"/save {file}: {error.strerror or error}.", expected="a file in a folder") from error
        return f"saved in {file}"

    def _help(self, _: str) -> str:
        width = max(map(len, self._commands))
        lines = [f"{name:<{width}}  {told}" for name, (told, _) in self._commands.items()]
        return "\n".join([*lines, f"{'/quit':<{width}}  end, as Ctrl-D does; Ctrl-C stops an answer"])
