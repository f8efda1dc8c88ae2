"""A run of distillation: sft's, with a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from hymba_tune.checkpoint import choose_dtype
from hymba_tune.config import DistillConfig
from hymba_tune.config.distill import Stage
from hymba_tune.data import cache_folder
from hymba_tune.data.training import opened
from hymba_tune.distill.alignment import matched_vocabulary
from hymba_tune.distill.cache import WIDE, TargetCache
from hymba_tune.distill.capture import (
    check_found,
    load_target_maker,
    open_targets,
    open_teacher,
    pair_of,
    teacher_bytes,
)
from hymba_tune.distill.chunks import CHUNK_BYTES
from hymba_tune.distill.matching import HiddenMatch, Layers
from hymba_tune.distill.outputs import Teacher, TeacherSpec
from hymba_tune.distill.pair import Side, TokenizerPair
from hymba_tune.distill.preflight import alignment_lines, check_aligned, end_line, look
from hymba_tune.distill.rollouts import RolloutGenerator
from hymba_tune.distill.rows import AlignedData, read_rows
from hymba_tune.distill.tables import same_tokenizer
from hymba_tune.distill.target_maker import TargetMaker
from hymba_tune.distill.targets import Targets
from hymba_tune.distill.teacher import ModelTeacher, parameters_of, smaller_than
from hymba_tune.distill.teacher_generations import TeacherGenerator
from hymba_tune.distill.teacher_signals import FROM_TARGETS, LossParameters, OnlineTeacher, TeacherSignals
from hymba_tune.distill.trainer import DistillTrainer
from hymba_tune.errors import ConfigError
from hymba_tune.train.flow import train
from hymba_tune.train.outline import PACKING
from hymba_tune.train.run import Run
from hymba_tune.train.samples import SAMPLES
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup
from hymba_tune.train.sft import data_of
from hymba_tune.train.task import TrainingTask

ONE_TOKENIZER = ("kl", "reverse-kl", "jsd")
"""Losses that compare the same tokens on both sides."""
LOSS_CHUNKS = 6
"""Times a chunk's logits that losses hold at most."""


def run_distill(config: DistillConfig, screen: Screen) -> Run | None:
    """Teach a model what another one knows; see `train`.

    Raises:
        ConfigError: If no teacher is named, or it cannot teach what is asked for.
    """
    lesson = _Distillation(config)
    kind = TrainingTask(lesson.read_data, lesson.make_trainer, lesson.describe, lesson.extra_bytes, lesson.prepare)
    return train(config, kind, screen)


class _Distillation:
    """What a run's steps hand on to each other."""

    def __init__(self, config: DistillConfig) -> None:
        self._config = config
        self._teacher: TeacherSpec | None = None
        self._pair: TokenizerPair | None = None
        self._data: AlignedData | None = None
        self._stages: list[Stage] = []
        self._targets: Sequence[Targets] | None = None
        self._maker: TargetMaker | None = None

    def read_data(self, setup: Setup, screen: Screen) -> Data:
        """Find the teacher, and read and align the data."""
        config = self._config
        self._teacher = open_teacher(config)
        self._pair = pair_of(config, setup.tokenizer, self._found)
        self._stages = resolve_losses(config, self._pair)
        self._data = data = read_rows(
            config,
            self._pair,
            context=self._found.context,
            seed=config.seed,
            prompts=SAMPLES,
            working=screen.working,
            instead=self._written(setup, screen),
        )
        if self._found.parameters is not None and (
            warning := smaller_than(self._found, parameters_of(setup.model_config))
        ):
            screen.note(warning)
        return data_of(setup, data)

    def prepare(self, setup: Setup, screen: Screen) -> None:
        """Have the teacher, or its targets, before the student's weights are loaded."""
        config = self._config
        assert self._data
        assert self._pair
        if config.dry_run and not self._found.is_here:
            check_aligned(self._data.alignment, config.min_aligned)
            screen.banner(alignment_lines(self._data.alignment, matched_vocabulary(self._pair)))
            screen.note("the teacher is not tried on a few rows: its weights are not on this machine")
        elif config.keeps_teacher or config.dry_run:
            self._maker = self._look(setup, screen)
        if self._wants_targets and not config.dry_run:
            self._targets = open_targets(
                config,
                self._data,
                self._pair,
                self._found,
                vocabulary=setup.model_config.vocab_size,
                device=setup.device,
                screen=screen,
            )

    @property
    def _found(self) -> TeacherSpec:
        assert self._teacher
        return self._teacher

    def _written(self, setup: Setup, screen: Screen) -> Path | None:
        """The data with the teacher's answers, if it is to write them."""
        config = self._config
        if not config.teacher_writes or config.dry_run:
            return None
        assert self._pair
        writer = TeacherGenerator(config, opened(config)[0], self._pair, lambda: self._found.fingerprint)
        with screen.working("reading what the teacher is to answer") as progress:
            key = writer.key(progress)
        with screen.working("the teacher answers") as progress:
            written = writer.write(cache_folder("answers") / key, partial(self._load, setup), progress)
        screen.note(
            f"the teacher answered {written.rows:,} conversations → {written.path}"
            + (f" · {written.left_out:,} answers left out, which did not end or are no text" * bool(written.left_out))
            + (f" · {written.texts:,} texts left out" * bool(written.texts))
        )
        return written.path

    def _load(self, setup: Setup) -> Teacher:
        return self._found.load(setup.device, choose_dtype(self._config.teacher_dtype, setup.device))

    @property
    def _wants_targets(self) -> bool:
        """Whether a loss of the data's answers is computed from kept targets."""
        if self._config.online:
            return False
        return any(stage.on_policy < 1 and FROM_TARGETS & stage.losses.keys() for stage in self._stages)

    def _look(self, setup: Setup, screen: Screen) -> TargetMaker:
        """The teacher, loaded, after a look at whether it fits the data."""
        config, data, pair = self._config, self._data, self._pair
        assert data
        assert pair
        vocabulary = setup.model_config.vocab_size
        with screen.working("loading the teacher"):
            maker = load_target_maker(config, data.rows, pair, self._found, vocabulary=vocabulary, device=setup.device)
        with screen.working("asking the teacher about a few rows"):
            found = look(maker, data.rows, data.alignment, pair, wide=vocabulary > WIDE)
        lines = found.lines()
        if not self._wants_targets:
            del lines["targets"]
        screen.banner(lines)
        check_found(config, found)
        return maker

    def make_trainer(
        self,
        setup: Setup,
        data: Data,
        model: PreTrainedModel,
        arguments: dict[str, Any],
        callbacks: list[TrainerCallback],
    ) -> DistillTrainer:
        """The trainer of the student."""
        assert self._pair
        packing = self._config.packing
        own = {"packing": packing, "packing_strategy": PACKING, "eval_packing": False}
        return DistillTrainer(
            signals=self._signals(setup),
            stages=self._stages,
            token_bytes=token_bytes(self._pair.student),
            rollouts=self._rollouts(),
            match=self._match(setup),
            match_weight=self._config.match_weight,
            model=model,
            args=trl.SFTConfig(**arguments, **own),
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=setup.tokenizer,
            callbacks=callbacks,
        )

    def _signals(self, setup: Setup) -> TeacherSignals:
        config = self._config
        shape = LossParameters(config.temperature, config.tau, config.beta)
        online = None
        if config.keeps_teacher:
            assert self._data
            assert self._maker
            online = OnlineTeacher(self._maker, self._data.rows)
        return TeacherSignals(shape, setup.device, self._targets, online)

    def _match(self, setup: Setup) -> HiddenMatch | None:
        if self._config.match_hidden is None:
            return None
        assert self._maker
        assert isinstance(self._maker.teacher, ModelTeacher)
        teacher = Layers.of(self._maker.teacher.model.config)
        return HiddenMatch(Layers.of(setup.model_config), teacher, self._config.match_hidden)

    def _rollouts(self) -> RolloutGenerator | None:
        config = self._config
        if not any(stage.on_policy for stage in self._stages):
            return None
        assert self._pair
        assert self._data
        return RolloutGenerator(
            self._pair,
            self._data.rows,
            config.max_length,
            config.answer_tokens,
            config.answer_temperature,
            config.seed,
        )

    def extra_bytes(self, setup: Setup) -> int:
        """Bytes of the teacher, if it is kept, and of the loss's chunks."""
        found = self._found
        held = teacher_bytes(self._config, found.config, found.parameters or 0, setup.model_config, setup.device)
        return held + LOSS_CHUNKS * CHUNK_BYTES

    def describe(self, setup: Setup) -> dict[str, str]:
        """The banner's lines on the teacher and what is learned from it."""
        del setup
        assert self._pair
        assert self._data
        aligned, targets = self._data.alignment, self._targets
        shown = targets.kept if isinstance(targets, TargetCache) else None
        kept = aligned.rows - sum(aligned.dropped.values())
        quantized = f" · {self._found.quantize}" if self._found.quantize else ""
        return {
            "teacher": f"{self._found.name} · {len(self._pair.teacher.spelling):,} tokens{quantized}",
            "aligned": f"{kept:,} of {aligned.rows:,} rows byte for byte",
            **(
                {"sanity": f"the teacher gives its own next token p = {shown.mean_own:.2f} on average"} if shown else {}
            ),
            **(end_line(shown, str(self._pair.teacher.tokenizer.eos_token)) if shown else {}),
            "loss": " · then ".join(_in_words(stage) for stage in self._stages)
            + " · answers written by the teacher" * self._config.teacher_writes
            + f" · {self._config.match_weight:g} × hidden states" * bool(self._config.match_hidden),
            **({"bias": self._found.bias} if self._found.bias and self._wants_targets else {}),
        }


def resolve_losses(config: DistillConfig, pair: TokenizerPair) -> list[Stage]:
    """The stages of a run with the losses that fit the pair.

    Raises:
        ConfigError: If one compares the same tokens on both sides, and there are none.
    """
    same = same_tokenizer(pair)
    for stage in config.parts:
        unfit = [f"--loss {name}" for name in ONE_TOKENIZER if name in stage.losses]
        unfit += ["--match-hidden"] if config.match_hidden else []
        if unfit and not same:
            raise ConfigError(
                f"{unfit[0]} compares the same tokens on both sides, and the teacher's tokenizer is another.",
                fix="--loss auto without --match-hidden" if config.match_hidden else "--loss auto, which is for that",
            )
    usual = {"kl": 1.0} if same else {"projection": 1.0, "alm": 1.0}
    stages = []
    for stage in config.parts:
        # What the teacher wrote is data like any other.
        losses = {name: weight for name, weight in stage.losses.items() if name != "seq"} or {"ce": 1.0}
        stages.append(replace(stage, losses=usual if "auto" in losses else losses))
    return stages


def token_bytes(side: Side) -> Tensor:
    """How many bytes of text each token spells, ``(V,)`` int64; the one that ends a turn, none."""
    sizes = torch.from_numpy(side.spelling.lengths.copy())
    sizes[list(side.ends)] = 0
    return sizes


def _in_words(stage: Stage) -> str:
    names = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in stage.losses.items())
    said = [f"{stage.share:.0%}:"] if stage.share < 1 else []
    taught = stage.losses.keys() - {"ce"}
    said.append(f"{stage.alpha:g} × ({names}) + {1 - stage.alpha:g} × ce" if taught else names)
    return " ".join(said + ([f"{stage.on_policy:.0%} of the answers its own"] if stage.on_policy else []))
