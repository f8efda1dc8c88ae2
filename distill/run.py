"""A run of distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
from hymba_tune.distill.alignment_report import alignment_lines, check_aligned, matched_vocabulary
from hymba_tune.distill.cache import TargetCache
from hymba_tune.distill.capture import (
    check_preflight,
    open_targets,
    open_teacher,
    pair_of,
    try_teacher,
)
from hymba_tune.distill.chunks import chunk_bytes
from hymba_tune.distill.matching import HiddenMatch, HiddenStateLoss, Layers
from hymba_tune.distill.memory import teacher_bytes
from hymba_tune.distill.outputs import TeacherSpec
from hymba_tune.distill.pair import Side, TokenizerPair
from hymba_tune.distill.preflight import end_line
from hymba_tune.distill.rollouts import RolloutGenerator
from hymba_tune.distill.rows import AlignedData, normalized, read_rows
from hymba_tune.distill.tables import same_tokenizer
from hymba_tune.distill.target_maker import TargetMaker
from hymba_tune.distill.teacher import parameters_of, smaller_than
from hymba_tune.distill.teacher_generations import TeacherGenerator
from hymba_tune.distill.teacher_signals import FROM_TARGETS, LossParameters, OnlineTeacher, TeacherSignals
from hymba_tune.distill.trainer import DistillTrainer
from hymba_tune.distributed.processes import first_of_node, from_main
from hymba_tune.errors import ConfigError
from hymba_tune.train.flow import train
from hymba_tune.train.outline import PACKING
from hymba_tune.train.run import Run
from hymba_tune.train.samples import SAMPLES
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup
from hymba_tune.train.sft import data_of

ONE_TOKENIZER = ("kl", "reverse-kl", "jsd")
"""Losses that need one tokenizer on both sides."""
LOSS_CHUNKS = 6
"""Memory of a loss, in multiples of a chunk's logits; a projection takes four."""


def run_distill(config: DistillConfig, screen: Screen) -> Run | None:
    """Train a student on what a teacher predicts; see `train`.

    Raises:
        ConfigError: If there is no teacher, or it does not fit the losses.
    """
    return train(DistillTask(config), screen)


@dataclass(frozen=True)
class DistillTask:
    """Distillation; see `hymba_tune.train.task.TrainingTask`."""

    config: DistillConfig

    def read_data(self, setup: Setup, screen: Screen) -> AlignedRun:
        """Find the teacher, and read and align the data."""
        config = self.config
        with first_of_node("finding the teacher"):
            teacher = open_teacher(config)
        pair = pair_of(config, setup.tokenizer, teacher)
        stages = resolve_losses(config, pair)
        generated = generated_data(config, teacher, pair, setup.device, screen)
        with first_of_node("reading the data"):
            aligned = read_rows(
                config,
                pair,
                context=teacher.context,
                seed=config.seed,
                prompts=SAMPLES,
                working=screen.working,
                normalize=config.normalize,
                instead=generated,
            )
        if teacher.parameters is not None and (warning := smaller_than(teacher, parameters_of(setup.model_config))):
            screen.note(warning)
        return AlignedRun(config, setup, teacher, pair, stages, aligned)


def generated_data(
    config: DistillConfig, teacher: TeacherSpec, pair: TokenizerPair, device: torch.device, screen: Screen
) -> Path | None:
    """Generate the teacher's answers to the data, if the settings have the seq loss; all processes do it together.

    Returns:
        The file of conversations with the teacher's answers; None where the data's own answers are used.
    """
    if not config.teacher_writes or config.dry_run:
        return None
    with first_of_node("finding the data"):
        sources = normalized(opened(config)[0], config.normalize)
    generator = TeacherGenerator(config, sources, pair, lambda: teacher.fingerprint)
    load = partial(teacher.load, device, choose_dtype(config.teacher_dtype, device))
    what = "reading the conversations for the teacher"
    with screen.working(what) as progress:
        questions = from_main(lambda: generator.questions(progress), what)
    with screen.working("generating the teacher's answers", questions.conversations) as progress:
        generations = generator.write(cache_folder("answers") / questions.key, questions, load, progress)

    lines = [f"the teacher answered {generations.rows:,} conversations → {generations.path}"]
    if generations.left_out:
        lines.append(f"{generations.left_out:,} answers left out because they did not end or are not a text")
    if generations.texts:
        lines.append(f"{generations.texts:,} texts left out")
    screen.note(" · ".join(lines))
    return generations.path


@dataclass(frozen=True)
class AlignedRun:
    """A run of distillation whose rows are read and aligned; see `hymba_tune.train.task.TaskWithData`.

    Attributes:
        config: The run's settings.
        setup: The run's setup.
        teacher: The teacher, not loaded.
        pair: The tokenizers of both sides.
        stages: The stages of the run, with the losses that fit the pair.
        aligned: The rows as both sides read them.
    """

    config: DistillConfig
    setup: Setup
    teacher: TeacherSpec
    pair: TokenizerPair
    stages: Sequence[Stage]
    aligned: AlignedData

    @cached_property
    def data(self) -> Data:
        """The rows that the student is trained on."""
        return data_of(self.setup, self.aligned)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the teacher, if it stays in memory, and of the loss's chunks."""
        teacher, setup = self.teacher, self.setup
        held = teacher_bytes(self.config, teacher.config, teacher.parameters or 0, setup.model_config, setup.device)
        return held + LOSS_CHUNKS * chunk_bytes(setup.device)

    @property
    def uses_targets(self) -> bool:
        """Whether a loss of the data's answers is computed from cached targets."""
        if self.config.online:
            return False
        return any(stage.on_policy < 1 and FROM_TARGETS & stage.losses.keys() for stage in self.stages)

    def prepare(self, screen: Screen) -> TaughtRun:
        """Load the teacher or its targets, before the student's weights are loaded."""
        config, maker, targets = self.config, None, None
        if config.dry_run and not self.teacher.is_here:
            check_aligned(self.aligned.alignment, config.min_aligned)
            screen.banner(alignment_lines(self.aligned.alignment, matched_vocabulary(self.pair)))
            screen.note("the teacher is not tried on a few rows: its weights are not on this machine")
        elif config.keeps_teacher or config.dry_run:
            maker = self._load_teacher(screen)
        if self.uses_targets and not config.dry_run:
            targets = open_targets(
                config,
                self.aligned,
                self.pair,
                self.teacher,
                vocabulary=self.setup.model_config.vocab_size,
                device=self.setup.device,
                screen=screen,
            )
        return TaughtRun(self, targets, maker)

    def _load_teacher(self, screen: Screen) -> TargetMaker:
        """Load the teacher, and check on a few rows that it fits the data."""
        setup = self.setup
        maker, preflight = try_teacher(
            self.config,
            self.aligned,
            self.pair,
            self.teacher,
            vocabulary=setup.model_config.vocab_size,
            device=setup.device,
            screen=screen,
        )
        lines = preflight.lines()
        if not self.uses_targets:
            del lines["targets"]
        screen.banner(lines)
        check_preflight(self.config, preflight)
        return maker


@dataclass(frozen=True)
class TaughtRun:
    """A run of distillation that has its teacher; see `hymba_tune.train.task.TrainerBuilder`.

    Attributes:
        run: The run with its rows.
        targets: The cached targets of the rows, if losses are computed from them.
        maker: The teacher in memory, if it stays there.
    """

    run: AlignedRun
    targets: TargetCache | None
    maker: TargetMaker | None

    def describe(self) -> dict[str, str]:
        """Return the banner's lines on the teacher and the losses."""
        run = self.run
        config, teacher, alignment = run.config, run.teacher, run.aligned.alignment
        quantized = f" · {teacher.quantize}" if teacher.quantize else ""
        aligned_rows = alignment.rows - sum(alignment.dropped.values())
        lines = {
            "teacher": f"{teacher.name} · {len(run.pair.teacher.spelling):,} tokens{quantized}",
            "aligned": f"{aligned_rows:,} of {alignment.rows:,} rows byte for byte",
        }
        if self.targets is not None:
            stats = self.targets.stats
            lines["sanity"] = f"the teacher gives its own next token p = {stats.mean_own:.2f} on average"
            lines |= end_line(stats, str(run.pair.teacher.tokenizer.eos_token))
        losses = " · then ".join(_in_words(stage) for stage in run.stages)
        losses += " · answers written by the teacher" * config.teacher_writes
        losses += f" · {config.match_weight:g} × hidden states" * bool(config.match_hidden)
        lines["loss"] = losses
        if teacher.bias and run.uses_targets:
            lines["bias"] = teacher.bias
        return lines

    def make_trainer(
        self, model: PreTrainedModel, arguments: dict[str, Any], callbacks: list[TrainerCallback]
    ) -> DistillTrainer:
        """Build the trainer of the student."""
        run = self.run
        config = run.config
        own = {"packing": config.packing, "packing_strategy": PACKING, "eval_packing": False}
        return DistillTrainer(
            signals=self._signals(),
            stages=run.stages,
            token_bytes=token_bytes(run.pair.student),
            rollouts=self._rollouts(),
            hidden_loss=self._hidden_loss(),
            model=model,
            args=trl.SFTConfig(**arguments, **own),
            train_dataset=run.data.train,
            eval_dataset=run.data.held_out,
            processing_class=run.setup.tokenizer,
            callbacks=callbacks,
        )

    def _signals(self) -> TeacherSignals:
        config = self.run.config
        shape = LossParameters(config.temperature, config.tau, config.beta)
        return TeacherSignals(shape, self.run.setup.device, self.targets, self._online())

    def _online(self) -> OnlineTeacher | None:
        if self.maker is None or not self.run.config.keeps_teacher:
            return None
        return OnlineTeacher(self.maker, self.run.aligned.rows)

    def _hidden_loss(self) -> HiddenStateLoss | None:
        config, online = self.run.config, self._online()
        if config.match_hidden is None or online is None:
            return None
        student = Layers.of(self.run.setup.model_config)
        teacher = Layers.of(self.run.teacher.config)
        return HiddenStateLoss(HiddenMatch(student, teacher, config.match_hidden), online, config.match_weight)

    def _rollouts(self) -> RolloutGenerator | None:
        config = self.run.config
        if not any(stage.on_policy for stage in self.run.stages):
            return None
        return RolloutGenerator(
            self.run.pair,
            self.run.aligned.rows,
            config.max_length,
            config.answer_tokens,
            config.answer_temperature,
            config.seed,
        )


def resolve_losses(config: DistillConfig, pair: TokenizerPair) -> list[Stage]:
    """Resolve the losses of each stage for a pair of tokenizers.

    Raises:
        ConfigError: If a loss needs one tokenizer on both sides, and there are two.
    """
    same = same_tokenizer(pair)
    for stage in config.parts:
        restricted = [f"--loss {name}" for name in ONE_TOKENIZER if name in stage.losses]
        restricted += ["--match-hidden"] if config.match_hidden else []
        if restricted and not same:
            raise ConfigError(
                f"{restricted[0]} compares the same tokens on both sides, and the teacher has another tokenizer.",
                fix="--loss auto without --match-hidden" if config.match_hidden else "--loss auto",
            )
    default = {"kl": 1.0} if same else {"projection": 1.0, "alm": 1.0}
    stages = []
    for stage in config.parts:
        # The teacher's answers are data, and seq adds no term to the loss.
        losses = {name: weight for name, weight in stage.losses.items() if name != "seq"} or {"ce": 1.0}
        stages.append(replace(stage, losses=default if "auto" in losses else losses))
    return stages


def token_bytes(side: Side) -> Tensor:
    """Return the text bytes of each token, ``(V,)`` int64; end tokens have none."""
    sizes = torch.from_numpy(side.spelling.lengths.copy())
    sizes[list(side.ends)] = 0
    return sizes


def _in_words(stage: Stage) -> str:
    names = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in stage.losses.items())
    words = [f"{stage.share:.0%}:"] if stage.share < 1 else []
    from_teacher = stage.losses.keys() - {"ce"}
    words.append(f"{stage.alpha:g} × ({names}) + {1 - stage.alpha:g} × ce" if from_teacher else names)
    return " ".join(words + ([f"{stage.on_policy:.0%} of the answers its own"] if stage.on_policy else []))
