"""The base of every trainer of a run: a mixin for TRL's trainers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from hymba_tune.distributed.environment import world_size
from hymba_tune.distributed.processes import gathered, sums, together
from hymba_tune.distributed.sharding import load_optimizer_state, state_of, whole_optimizer_state, whole_weights
from hymba_tune.files import seal
from hymba_tune.files.checkpoints import forget_oldest
from hymba_tune.train.even_batches import EvenOrder, EvenRows, FillerBatch, WithoutFillers
from hymba_tune.train.optimizers import Rates, parameter_groups


class RunTrainer(Trainer):
    """Mixin with a learning rate for each kind of parameter and sealed checkpoints; list it before the TRL trainer.

    The trainer computes on its model's device.

    Attributes:
        rates: The learning rates; None for the one in the arguments.
        held_out_sources: The number of held-out rows of each source, in their order; may be empty where there is only
            one source.
        step_batches: The batches of the current step, each with its share of the step's loss.
        kept_checkpoints: The number of checkpoints to keep; None for all.
        restrict: Excludes rows of an adapter from training again (`restrict_rows`), as FSDP replaces its parameters.
        held_out_parts: The summed loss of each part of the held-out data at the last evaluation, and what it is summed
            over: of each batch, or of each row where `held_out_sums` returns those.
        stop_requested: Whether Ctrl-C was pressed in this process.
        stop_agreed: Whether it was in any process by the time of the step.
    """

    is_fsdp_enabled: bool
    rates: Rates | None = None
    kept_checkpoints: int | None = None
    restrict: Callable[[Any], None] | None = None
    held_out_sources: Mapping[str, int] = MappingProxyType({})

    def __init__(self, **kwargs: Any) -> None:
        self.step_batches: list[tuple[dict[str, Any], Tensor]] = []
        self._grad_norm: Tensor | float = 0.0
        self._step_tokens: list[Tensor] = []
        self.held_out_parts: list[tuple[float, float]] = []
        self.stop_requested = False
        self.stop_agreed = False
        self._order: EvenOrder | None = None
        use_one_device(kwargs["args"], kwargs["model"].device)
        super().__init__(**kwargs)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trained parameters in the optimizer's groups."""
        return parameter_groups(
            self.model,
            self.rates or Rates(self.args.learning_rate),
            weight_decay=self.args.weight_decay,
            decayed=self.get_decay_parameter_names(self.model),
        )

    def get_optimizer_cls_and_kwargs(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Return transformers' optimizer class and its arguments, with our parameter groups."""
        optimizer, arguments = Trainer.get_optimizer_cls_and_kwargs(*args, **kwargs)
        return optimizer, {**arguments, "params": self.parameter_groups()}

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the parameters with weight decay: not the SSM's rates A and skips D, which need not be small."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith((".A_log.0", ".D.0"))]

    def _get_dataloader(
        self, dataset: datasets.Dataset, description: str, batch_size: int, *, is_training: bool = False, **others: Any
    ) -> DataLoader[Any]:
        # The batches of one process are those of transformers. Several take them in turn; see `even_batches`.
        make: Callable[..., DataLoader[Any]] = super()._get_dataloader
        if world_size() == 1:
            return make(dataset, description, batch_size, is_training=is_training, **others)
        rows = self._remove_unused_columns(dataset, description=description)
        even = EvenRows(rows, batch_size * world_size())
        if is_training:
            self._order = EvenOrder(self._train_order(rows), len(even))
            others["sampler_fn"] = lambda _: self._order
        collator = vars(self)["data_collator"]
        self.data_collator = WithoutFillers(collator)
        try:
            return make(even, description, batch_size, is_training=is_training, **others)
        finally:
            self.data_collator = collator

    def _train_order(self, rows: datasets.Dataset) -> Any:
        """Return the order that Accelerate gives the rows of a single process."""
        order = self._get_train_sampler(rows)
        return SeedableRandomSampler(rows, data_seed=self.args.data_seed) if type(order) is RandomSampler else order

    def held_out_batches(self, dataloader: DataLoader[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the batches of held-out rows with their source's name. No batch holds rows of two sources.

        Of several processes each yields its own batches, and all yield equally many, in which none has rows of another
        source than the others: those that have none left yield a `FillerBatch`.

        Args:
            dataloader: The batches of all held-out rows.
        """
        if len(self.held_out_sources) < 2:
            yield from (("", self._prepare_inputs(batch)) for batch in dataloader)
            return
        start = 0
        for name, count in self.held_out_sources.items():
            rows = self.eval_dataset.select(range(start, start + count))
            yield from ((name, self._prepare_inputs(batch)) for batch in self.get_eval_dataloader(rows))
            start += count

    def held_out_sums(self, inputs: dict[str, Any]) -> Mapping[str, tuple[Tensor | float, Tensor | float]]:
        """Measure one batch of held-out rows.

        Args:
            inputs: The batch, on the model's device.

        Returns:
            The sum of each measure over the batch and what it is summed over (tokens, answers, pairs), by its logged
            name without ``eval_``. ``loss`` must be among them; both of its values may be ``(n,)``, of each row.
        """
        raise NotImplementedError

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """Return the means over all held-out rows; where there are several sources, also the loss of each.

        The loops of transformers and TRL average over batches, whatever number of tokens or answers each holds.
        """
        del description
        self.model.eval()

        def zeros() -> Tensor:
            return torch.zeros(2, dtype=torch.float64, device=self.args.device)

        parts: dict[str, Tensor] = defaultdict(zeros)
        losses: list[Tensor] = []
        for source, inputs in self.held_out_batches(dataloader):
            with torch.no_grad(), self.compute_loss_context_manager():
                measured = self.held_out_sums(inputs)
            if isinstance(inputs, FillerBatch):  # measured, as all processes must run their models equally often
                losses.append(zeros()[:, None][:, :0])
                continue

            for name, pair in measured.items():
                own = torch.stack([torch.as_tensor(value).to(zeros()).reshape(-1) for value in pair])
                part = own.sum(1)
                parts[name] += part
                if name == "loss":
                    losses.append(own)
                if name == "loss" and source:
                    parts[f"loss/{source}"] += part

        totals = sums({name: float(part[0]) for name, part in parts.items()})
        counts = sums({name: float(part[1]) for name, part in parts.items()})
        self.held_out_parts = _in_turn(gathered([[tuple(pair) for pair in own.T.tolist()] for own in losses]))
        means = {name: total / counts[name] if counts[name] else 0.0 for name, total in totals.items()}
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run a batch's forward and backward, and keep the batch and its loss until the next step begins."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_batches.append((inputs, loss))
        return loss

    def step_numbers(self) -> tuple[list[float], float]:
        """Return the loss of each batch of the step, as its share, and the norm of the gradient before clipping.

        They and the number of tokens are read together, since every reading waits for the device.
        """
        tokens, self._step_tokens = self._step_tokens, []
        numbers = [*(loss.detach() for _, loss in self.step_batches), *tokens]
        norm = self._grad_norm
        if isinstance(norm, DTensor) or (isinstance(norm, Tensor) and norm.device != numbers[0].device):
            norm = float(norm)  # of gradients that are divided or on the CPU
        numbers += [norm] if isinstance(norm, Tensor) else []
        read = torch.stack([number.double() for number in numbers]).tolist()

        batches = len(self.step_batches)
        self.state.num_input_tokens_seen += int(sum(read[batches : batches + len(tokens)]))
        return read[:batches], read[-1] if isinstance(norm, Tensor) else norm

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Tensor | float:
        self._grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self._grad_norm

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of texts, as transformers does but without waiting for their number."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        mask = inputs.get("attention_mask", inputs["input_ids"] != self.processing_class.pad_token_id)
        count = torch.zeros_like(mask[0, 0]) if isinstance(inputs, FillerBatch) else mask.sum()
        self._step_tokens.append(self.accelerator.gather(count.long()).sum())

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._order is not None:
            self._order.set_epoch(kwargs["epoch"])  # Accelerate does not where the batches of an epoch are skipped
        # Resumed within an epoch after a run's last step, transformers would take one more step.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with which FSDP leaves weights in their dtypes: autocast chooses those of a step."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    @property
    def is_divided(self) -> bool:
        """Whether FSDP or DeepSpeed divides the training, so that a process may hold only parts of the weights."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        # A checkpoint is that of one process, whatever the strategy: transformers would look for FSDP's and DeepSpeed's
        # own. The weights are read before they are divided, the optimizer's states after.
        resumes = resume_from_checkpoint is not None and self.is_divided
        if resumes:
            self.load_weights(Path(str(resume_from_checkpoint)), self.model)
        prepared: tuple[Any, Any] = super()._prepare_for_training(
            max_steps, train_dataloader, None if resumes else resume_from_checkpoint
        )
        if self.is_deepspeed_enabled:
            from hymba_tune.distributed.zero import step_later  # DeepSpeed need not be installed

            step_later(self.accelerator, self.optimizer)
        if self.is_divided and self.args.mixed_precision != "no":
            # As Accelerate does in one process; FSDP and DeepSpeed would round the trained weights instead.
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16
            self.model.forward = torch.autocast(self.args.device.type, dtype)(self.model.forward)
        if self.is_fsdp_enabled and self.restrict is not None:
            self.restrict(self.model)
        if resumes:
            folder = Path(str(resume_from_checkpoint))
            saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            load_optimizer_state(self.optimizer, self.parameter_groups(), saved)
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        return prepared

    def load_weights(self, checkpoint: Path, model: PreTrainedModel) -> None:
        """Load the weights of a checkpoint into a model that is not divided, as one process does."""
        by_fsdp, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            self._load_from_checkpoint(str(checkpoint), model)
        finally:
            self.is_fsdp_enabled = by_fsdp

    def _load_best_model(self) -> None:
        if not self.is_divided:  # of divided weights the best are read when they are whole; see `whole_model`
            super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained weights as one process does; of a divided model, all processes must call this."""
        with together("writing the weights"):
            if not self.is_divided:
                super().save_model(output_dir, _internal_call)
                return
            names = list(self.model.state_dict())
            with whole_weights(self.model):  # PEFT also reads some of its modules itself, whatever state it is given
                if self.args.should_save:
                    self._save(output_dir, state_of(self.model, names))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with together("writing the optimizer's state"):
            self._write_optimizer_and_scheduler(output_dir)

    def _write_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_divided:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer, self.parameter_groups())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # TRL's own method writes a model card into every checkpoint.
        with together("writing the checkpoint"):
            Trainer._save_checkpoint(self, model, trial)
        with together("sealing the checkpoint"):
            self._seal_checkpoint()

    def _seal_checkpoint(self) -> None:
        """Mark a checkpoint that is complete, and remove older ones."""
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir)
        seal(folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.kept_checkpoints is not None:
            forget_oldest(folder, keep=self.kept_checkpoints, best=self.state.best_model_checkpoint)


def use_one_device(args: TrainingArguments, device: torch.device) -> None:
    """Make a trainer compute on one device. By default it uses the first GPU and splits batches among all of them.

    Args:
        args: The arguments of the trainer to build; changed in place.
        device: The model's device.
    """
    args._n_gpu = min(args.n_gpu, 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type != "cpu":
        vars(args)["_setup_devices"] = device  # what the cached property of this name holds
        args.distributed_state.device = device  # which Accelerate reads


def keep_own_forward(model: PreTrainedModel) -> None:
    """Restore a model's own forward, which TRL's trainers replace by one that reads the head's weight.

    The model's own forward separates documents, computes logits of the requested tokens only, and is several
    times faster on a CPU.

    Args:
        model: The model, with or without an adapter.
    """
    vars(getattr(model, "get_base_model", lambda: model)()).pop("forward", None)


@contextmanager
def quantization_unseen(model: PreTrainedModel) -> Iterator[None]:
    """Hide quantization from TRL's trainers while they are built: they would round the adapter to bfloat16.

    Args:
        model: The model, with or without an adapter.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    flags = {name: vars(base).pop(name) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit") if name in vars(base)}
    try:
        yield
    finally:
        vars(base).update(flags)


def _in_turn(parts: list[list[list[Any]]]) -> list[Any]:
    """Return the parts of the batches of all processes in the order of the rows: each process takes a batch in turn."""
    return [part for batches in zip_longest(*parts, fillvalue=()) for batch in batches for part in batch]
