"""Chat with one model, or with several side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import set_seed

from hymba_tune.checkpoint import check_length
from hymba_tune.config import ChatConfig
from hymba_tune.data import Conversation, Message, encode_prompt
from hymba_tune.data.values import read_text
from hymba_tune.errors import ConfigError
from hymba_tune.files.checkpoints import at_checkpoint
from hymba_tune.generate.answers import answer
from hymba_tune.generate.opening import LoadableModel, find_model
from hymba_tune.inputs import check_inputs

OnText = Callable[[str], None]
"""Called with each new part of an answer."""

EMPTY = "the conversation is empty"


class Chat:
    """A conversation with a model.

    Args:
        config: The model and the generation settings.
        on_note: Called with each note for the user; a note on the context length is given only once.
        loadable: The model, if it is resolved already.

    Raises:
        HymbaTuneError: If the model cannot be found or loaded.
    """

    def __init__(
        self,
        config: ChatConfig,
        on_note: Callable[[str], None] = lambda _: None,
        loadable: LoadableModel | None = None,
    ) -> None:
        loadable = loadable or find_model(at_checkpoint(config.model, config.checkpoint), config)
        self.name = loadable.source.name
        self._config = config
        self._on_note: Callable[[str], None] | None = on_note
        self._tokenizer = loadable.tokenizer
        self._model = loadable.load()
        if note := loadable.note:  # by now the weights of a Hub model are on this machine
            on_note(note)
        self._system = config.system
        self._messages: list[Message] = []
        if config.seed is not None:
            set_seed(config.seed)

    @property
    def messages(self) -> Sequence[Message]:
        """The conversation so far, starting with the system prompt if there is one."""
        return [*([Message("system", self._system)] if self._system else []), *self._messages]

    def reset(self) -> None:
        """Clear the conversation; the system prompt stays."""
        self._messages = []

    def undo(self) -> bool:
        """Remove the last question and its answer; False if the conversation is empty."""
        has_messages = bool(self._messages)
        self._messages = self._messages[:-2]
        return has_messages

    def use_system(self, prompt: str | None) -> None:
        """Replace the system prompt, or remove it."""
        self._system = prompt

    def reply(self, text: str, on_text: OnText | None = None) -> str:
        """Add a user message to the conversation and generate the model's reply.

        Args:
            text: The user's message.
            on_text: Called with each new part of the reply.

        Raises:
            ConfigError: If ``strict_length`` is set and the longest possible reply does not fit into the context.
            DataError: If a text is not UTF-8, or the chat template refuses the conversation.
        """
        conversation = Conversation((*self.messages, Message("user", text)))
        for message in conversation.messages:
            read_text(message.content, f"the {message.role} message")
        self._check_length(conversation)
        reply = answer(
            self._model,
            self._tokenizer,
            conversation,
            max_new_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            cuda_graphs=self._config.cuda_graphs,
            on_text=on_text,
        )
        # Added only now, so that an interrupted reply leaves the conversation as it was.
        self._messages += [Message("user", text), Message("assistant", reply)]
        return reply

    def _check_length(self, conversation: Conversation) -> None:
        strict = self._config.strict_length
        tokens = len(encode_prompt(conversation, self._tokenizer))
        longest = tokens + self._config.max_new_tokens if strict else tokens
        warning = check_length(longest, self._model.config, strict=strict)
        if warning and self._on_note:
            self._on_note(warning)
            self._on_note = None


class ChatSession:
    """The same conversation with one or several models, and the commands that change it.

    Args:
        config: The models and the generation settings.
        on_note: Called with each note for the user.

    Raises:
        HymbaTuneError: If a model cannot be found or loaded.
    """

    def __init__(self, config: ChatConfig, on_note: Callable[[str], None] = lambda _: None) -> None:
        check_inputs(config)
        names = dict.fromkeys([at_checkpoint(config.model, config.checkpoint), *config.against])
        loadables = [find_model(name, config) for name in names]  # all are resolved before the first one loads
        self.chats = [Chat(config, on_note, loadable) for loadable in loadables]
        self._commands: dict[str, tuple[str, Callable[[str], str]]] = {
            "/undo": ("remove the last question and its answer", self._undo),
            "/reset": ("clear the conversation; the system prompt stays", self._reset),
            "/system": ("TEXT: set the system prompt; without TEXT, remove it", self._system),
            "/history": ("show the conversation", self._history),
            "/save": ("FILE: append the conversation to FILE (.jsonl), as a training row", self._save),
            "/help": ("show this list", self._help),
        }

    def reply(
        self,
        text: str,
        on_text: OnText,
        *,
        on_begin: Callable[[str], None] = lambda _: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Generate every model's reply to a message, one model after the other.

        An interruption removes the message from all conversations.

        Args:
            text: The user's message.
            on_text: Called with each new part of each reply.
            on_begin: Called with a model's name before its reply.
            on_end: Called after its reply, also when it was interrupted.
        """
        answered: list[Chat] = []
        try:
            for chat in self.chats:
                on_begin(chat.name)
                try:
                    chat.reply(text, on_text)
                finally:
                    on_end()
                answered.append(chat)
        except BaseException:
            for chat in answered:
                chat.undo()
            raise

    def command(self, line: str) -> str:
        """Run a command line that begins with /, and return its output.

        Raises:
            ConfigError: If the command does not exist or fails.
        """
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ConfigError(f"Unknown command {name}.", expected=", ".join(["/quit", *self._commands]))
        return self._commands[name][1](rest.strip())

    def _undo(self, _: str) -> str:
        undone = [chat.undo() for chat in self.chats]
        return "removed the last question and answer" if any(undone) else EMPTY

    def _reset(self, _: str) -> str:
        for chat in self.chats:
            chat.reset()
        return "conversation cleared"

    def _system(self, prompt: str) -> str:
        for chat in self.chats:
            chat.use_system(prompt or None)
        return f"system prompt: {prompt or 'none'}"

    def _history(self, _: str) -> str:
        lines = []
        for chat in self.chats:
            head = [f"{chat.name}:"] if len(self.chats) > 1 else []
            lines += [*head, *(f"{message.role}: {message.content}" for message in chat.messages)]
        return "\n".join(lines) or EMPTY

    def _save(self, file: str) -> str:
        if not file.endswith(".jsonl"):
            raise ConfigError(f"/save {file}: not a file name in .jsonl.", expected="/save FILE.jsonl")
        conversations = [
            chat.messages for chat in self.chats if chat.messages[-1:] and chat.messages[-1].role == "assistant"
        ]
        rows = [{"messages": [{"role": m.role, "content": m.content} for m in messages]} for messages in conversations]
        if not rows:
            return EMPTY
        try:
            with Path(file).expanduser().open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise ConfigError(f"/save {file}: {error.strerror or error}.", expected="a writable file") from error
        return f"saved to {file}"

    def _help(self, _: str) -> str:
        width = max(map(len, self._commands))
        lines = [f"{name:<{width}}  {description}" for name, (description, _) in self._commands.items()]
        return "\n".join([*lines, f"{'/quit':<{width}}  quit, like Ctrl-D; Ctrl-C stops an answer"])
