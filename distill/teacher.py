"""A model as a teacher: looked up by its name without its weights, and loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hymba_tune.adapters import count_parameters, open_model, short_count, tokenizer_folder, weights_of
from hymba_tune.checkpoint import read_header, weight_files
from hymba_tune.config import Scheme
from hymba_tune.distill.chunks import Head
from hymba_tune.distill.outputs import HeadOutputs, TeacherSpec
from hymba_tune.errors import CheckpointError, ConfigError, command
from hymba_tune.generate import write
from hymba_tune.registry import TEACHERS, ModelSource, fetch_weights, has_weights, resolve_model
from hymba_tune.schemes import decide_quantization

FLAG = "--teacher"
BATCH_TOKENS = {"cuda": 16384, "cpu": 4096}
"""Tokens in a batch of the teacher, padding included."""
PROBE_TOKENS = 16
CLOSE = 0.02
"""Tolerance of logits against hidden states times output layer, relative to the largest; bfloat16 rounds by 0.004."""
ROUNDING = 1e-3
"""Tolerance of a scale of logits around 1, within which there is no scale."""


@dataclass(frozen=True)
class LocalTeacherSpec:
    """A local or Hub model as a teacher, before its weights are loaded or downloaded.

    Attributes:
        name: The name that messages use.
        source: The location of the model.
        config: The model's configuration.
        tokenizer: The model's tokenizer.
        context: The maximum number of tokens in a row; None if the configuration does not say.
        quantize: The quantization scheme of the weights, if any.
        bias: Empty, because all probabilities are available.
    """

    name: str
    source: ModelSource
    config: Any
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    quantize: Scheme | None = None
    bias: str = ""

    @cached_property
    def parameters(self) -> int:
        """The number of parameters, according to the configuration."""
        return parameters_of(self.config)

    @property
    def is_here(self) -> bool:
        """Whether it can be loaded without a download."""
        return has_weights(self.source) and has_weights(weights_of(self.source))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and the configuration. Files that the Hub's cache names by theirs are not read.

        Weights on the Hub are downloaded.
        """
        weights = weights_of(self.source)
        for source in (self.source, weights):
            fetch_weights(source)
        folder = weights.folder
        files = [*weight_files(folder), folder / "config.json"]
        if self.source.adapter:
            files += sorted(self.source.adapter.glob("adapter_*"))
        return hashlib.sha256("".join(map(_digest, files)).encode()).hexdigest()

    def load(self, device: torch.device, dtype: torch.dtype) -> ModelTeacher:
        """Load the weights.

        Args:
            device: The device of the weights.
            dtype: The dtype of the weights; quantized weights compute in it.

        Raises:
            CheckpointError: If the weights cannot be used.
            HubError: If the weights cannot be downloaded.
            ConfigError: If the logits are not the hidden states times the output layer.
        """
        decided = decide_quantization(self.config, self.quantize, dtype) if self.quantize else None
        quantization = decided.while_loading if decided else None
        if self.config.model_type == "hymba":
            model = open_model(self.source, dtype=dtype, device=device, quantization=quantization)
        else:
            model = self._load(dtype, device, quantization)
        return ModelTeacher(model.eval().requires_grad_(False), self.tokenizer, self.name)

    def _load(
        self, dtype: torch.dtype, device: torch.device, quantization: BitsAndBytesConfig | None
    ) -> PreTrainedModel:
        fetch_weights(self.source)
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                self.source.folder,
                dtype=dtype,
                device_map={"": device},
                quantization_config=quantization,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise CheckpointError(f"The teacher {self.name} cannot be loaded: {error}") from error
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(
                f"The teacher {self.name} lacks {len(missing):,} of its tensors, {missing[0]} first.",
                expected="the weights that its config.json describes",
                fix="download or copy it again",
            )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # its kernel refuses layers of some sizes
        return model


def find_teacher(name: str, quantize: Scheme | None = None) -> LocalTeacherSpec:
    """Find a teacher without loading it. Of a Hub model, only the configuration and tokenizer are downloaded.

    Args:
        name: An alias, a Hub id, a folder, or a run directory.
        quantize: The quantization scheme of the weights, if any.

    Raises:
        ConfigError: If the name is none of these, or the model cannot be quantized.
        CheckpointError: If the configuration, weights or tokenizer are missing or cannot be used.
        HubError: If the Hub cannot be reached or refuses.
    """
    source = resolve_model(name, flag=FLAG, aliases=TEACHERS)
    weights = weights_of(source)
    config = _read_config(weights.folder, source.name)
    if source.adapter and config.model_type != "hymba":
        raise CheckpointError(
            f"{FLAG} {name} is an adapter of a {config.model_type} model.",
            expected="full weights",
            fix="merge it into its base model, and pass the merged folder",
        )
    if quantize and source.adapter:
        raise ConfigError(
            f"--teacher-quantize: {source.name} is an adapter, which must be merged first.",
            fix=f"{command('merge', source.name, '--out', 'merged')}, then --teacher merged",
        )
    if quantize:
        decide_quantization(config, quantize, torch.float32, flag="--teacher-quantize", name=source.name)
    if weights.hub_id is None:
        for file in weight_files(weights.folder):
            read_header(file)
    return LocalTeacherSpec(
        name=source.name,
        source=source,
        config=config,
        tokenizer=read_tokenizer(tokenizer_folder(source), source.name),
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        quantize=quantize,
    )


def read_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """Read a teacher's tokenizer from its ``tokenizer.json``.

    Raises:
        CheckpointError: If there is no such file, or it cannot be read.
    """
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"The teacher {name} has no tokenizer.json in {folder}.",
            expected="a fast tokenizer next to its weights: its text is compared with the student's byte by byte",
            fix="copy tokenizer.json and tokenizer_config.json of its base model next to its weights",
        )
    try:
        # AutoTokenizer would rebuild some tokenizers, with other ids than the file's.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"The tokenizer of the teacher {name} cannot be read: {error}", expected="a tokenizer.json"
        ) from error


def parameters_of(config: Any) -> int:
    """Return the number of parameters of a model, without its weights."""
    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(config))[1]


def smaller_than(teacher: TeacherSpec, student_parameters: int) -> str | None:
    """Return a warning if the teacher is smaller than the student."""
    if teacher.parameters is None or teacher.parameters >= student_parameters:
        return None
    sizes = f"{short_count(teacher.parameters)} parameters to {short_count(student_parameters)}"
    return f"the teacher is smaller than the student ({sizes}): expect little, unless it knows this data better"


def _read_config(folder: Path, name: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"The config.json of the teacher {name} cannot be used: {error}") from error
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(
            f"The teacher {name} is a {config.model_type} model, which does not generate text.",
            expected="a causal language model that transformers supports without remote code",
        )
    return config


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file, which is the name of weights in the Hub's cache."""
    blob = file.resolve().name
    if file.is_symlink() and len(blob) == 64:
        return blob
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class ModelTeacher:
    """A teacher whose weights are loaded; see `Teacher`.

    Args:
        model: A causal language model in evaluation mode, whose logits are its last hidden states times the weight of
            its output layer, or a multiple of that.
        tokenizer: The model's tokenizer. Rows of the output layer after its last token are removed. Tokens after the
            last row have no probability, and no row may contain them.
        name: The name that messages use.

    Raises:
        ConfigError: If the logits are anything else.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.name, self.tokenizer, self.model = name, tokenizer, model
        self._backbone, head = model.base_model, model.get_output_embeddings()
        size = 1 + max(tokenizer.get_vocab().values())
        if head is None or self._backbone is model or not head.weight.is_floating_point():
            raise ConfigError(f"The teacher {name} has no output layer that can be read.")
        self._scale = self._check_logits(model)
        self._weight: Tensor = head.weight[:size]
        self._vocabulary = size

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._weight.device

    @torch.no_grad()
    def outputs(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, HeadOutputs]]:
        """Read rows, in batches of similar length; see `Teacher`."""
        for batch in batches([len(row) for row in rows], BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])):
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[index]) for index in batch], batch_first=True)
            lengths = torch.tensor([len(rows[index]) for index in batch])
            ids = ids.to(self.device)
            hidden = self._read(ids, lengths.to(self.device)) * self._scale
            for place, index in enumerate(batch):
                size = len(rows[index])
                yield index, HeadOutputs(Head(hidden[place, :size], self._weight), ids[place, :size], self._vocabulary)

    def full_vocabulary(self, rows: Sequence[Sequence[int]]) -> list[HeadOutputs]:
        """Return the outputs for all rows, in their order; see `Teacher`."""
        by_row = dict(self.outputs(rows))
        return [by_row[index] for index in range(len(rows))]

    @torch.no_grad()
    def hidden_states(self, rows: Sequence[Sequence[int]], at: Sequence[Tensor]) -> list[Tensor]:
        """Compute hidden states at some tokens of some rows; see `Teacher`."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        states = self._backbone(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        return [torch.cat([state[row, positions] for row, positions in enumerate(at)]) for state in states]

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        ends: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        decode: Callable[[list[int]], str | None],
    ) -> list[str | None]:
        """Write an answer to each prompt, without touching the global random state; see `Teacher`."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            answers = write(self.model, prompts, ends=ends, max_new_tokens=max_new_tokens, temperature=temperature)
        return list(map(decode, answers))

    def _read(self, ids: Tensor, lengths: Tensor) -> Tensor:
        mask = None  # attention is fastest without a mask
        if lengths.min() < ids.shape[1]:
            mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        hidden: Tensor = self._backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def _check_logits(self, model: PreTrainedModel) -> float:
        """Return the factor between the logits and hidden states times output layer, measured on a few tokens."""
        head = model.get_output_embeddings()
        ids = torch.arange(1, PROBE_TOKENS, device=head.weight.device)[None] % len(head.weight)
        hidden = self._read(ids, torch.tensor([ids.shape[1]]))
        ours = Head(hidden[0], head.weight).logits(slice(None)).double()
        own = model(input_ids=ids, use_cache=False).logits[0].double()
        scale = float((own * ours).sum() / (ours * ours).sum())
        largest = own.abs().max()
        capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        if capped or not ((own - scale * ours).abs().max() <= CLOSE * largest):
            raise ConfigError(
                f"The logits of the teacher {self.name} are not its hidden states times its output layer"
                + (" (final_logit_softcapping)." if capped else "."),
                expected="a model without a bias or a cap after its output layer, such as Llama or Qwen",
            )
        return scale if abs(scale - 1) > ROUNDING else 1.0


def batches(lengths: Sequence[int], tokens: int, rows: int | None = None) -> Iterator[list[int]]:
    """Group rows of similar length into batches, the longest rows first.

    Args:
        lengths: The number of tokens of each row.
        tokens: The maximum number of tokens in a batch with its padding; a longer row is a batch on its own.
        rows: The maximum number of rows in a batch; None is no limit.

    Yields:
        The indices of the rows of a batch.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and ((len(batch) + 1) * lengths[batch[0]] > tokens or len(batch) == rows):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
