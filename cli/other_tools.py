"""Names of verbs, flags and values in transformers, TRL, PEFT, Axolotl, LLaMA-Factory and Unsloth."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from cyclopts import Argument

from hymba_tune.errors import ConfigError, command, nearest

_VERBS = {
    "sft --data FILE": "train training fit run start finetune fine-tune fine_tune tune lora qlora instruct pretrain",
    "dpo --data FILE": "align preference rlhf",
    "eval MODEL --data FILE": "evaluate evaluation test benchmark lm-eval lm_eval score measure",
    "chat MODEL": "generate infer inference predict talk ask complete",
    "serve MODEL": "server api deploy",
    "export RUN --push USER/NAME": "push upload publish save",
    "merge RUN --out FOLDER": "merge-lora merge_lora merge_adapter fuse",
    "quantize MODEL": "quant quantise quantization",
    "data check FILE": "check dataset preprocess prepare validate",
    "data preview FILE": "preview show view",
    "data convert FILE": "convert",
    "distill --teacher MODEL --data FILE": "distil distillation gkd",
    "recipes": "recipe list config configs examples ls",
    "init": "configure setup new wizard",
    "doctor": "info env diagnose check-env status",
    "plan": "estimate memory dry-run",
}
_FLAGS = {
    "--model": "model_name_or_path model_name model_id model_path base_model pretrained pretrained_model_name_or_path",
    "--model RUN": "adapter_name_or_path lora_model_dir adapter_path lora_path lora_model_path",
    "--dtype": "torch_dtype precision",
    "--dtype bfloat16": "bf16",
    "--dtype float16": "fp16",
    "--device": "device_map use_device",
    "--device cpu": "no_cuda use_cpu",
    "--kernels attention=NAME": "attn_implementation flash_attention flash_attn use_flash_attention "
    "use_flash_attention_2 sdp_attention",
    "--data": "dataset datasets dataset_name dataset_path data_path data_files train_file train_data train_dataset",
    "--caps": "max_samples max_train_samples",
    "--weights": "interleave_probs dataset_weights sampling_weights",
    "--map text=COLUMN": "dataset_text_field text_column text_field",
    "--max-length": "max_seq_length max_seq_len max_len sequence_len seq_len seq_length cutoff_len model_max_length "
    "block_size",
    "--chat-template": "template prompt_template chat_template_path conversation_template",
    "--learn": "train_on_inputs train_on_prompt assistant_only_loss completion_only_loss mask_history",
    "--eval-data": "eval_dataset eval_file validation_file val_file val_data validation_data test_datasets "
    "eval_dataset_path",
    "--eval-split": "val_set_size val_size test_size validation_split eval_size validation_split_percentage",
    "--eval-max-rows": "max_eval_samples",
    "--on-bad-row skip": "skip_errors",
    # The first name of each is what this kit itself once had.
    "--desirable-weight": "good_weight kto_chosen_weight kto_desirable_weight",
    "--undesirable-weight": "bad_weight kto_rejected_weight kto_undesirable_weight",
    "--epochs": "num_epochs num_train_epochs n_epochs epoch max_epochs",
    "--steps": "max_steps num_steps total_steps iters num_iters",
    "--batch-size": "per_device_train_batch_size train_batch_size micro_batch_size per_device_batch_size bs bsz "
    "per_device_eval_batch_size eval_batch_size",
    "--grad-accum": "gradient_accumulation_steps accumulate_grad_batches grad_accumulation_steps grad_acc gradient_"
    "accumulation",
    "--packing": "sample_packing pack",
    "--lr": "learning_rate peak_lr",
    "--lr-min": "min_lr cosine_min_lr_ratio min_lr_ratio",
    "--lr-schedule": "lr_scheduler_type lr_scheduler scheduler",
    "--warmup": "warmup_ratio",
    "--warmup SHARE_OF_STEPS": "warmup_steps num_warmup_steps",
    "--loraplus-ratio": "loraplus_lr_ratio",
    "--optimizer": "optim optimizer_type",
    "--max-grad-norm": "gradient_clipping gradient_clip_val grad_clip clip_grad_norm max_gradient_norm",
    "--neftune-alpha": "neftune_noise_alpha",
    "--gradient-checkpointing": "use_gradient_checkpointing grad_checkpoint gradient_checkpoint",
    "--activation-offload": "activation_offloading",
    "--seed": "random_state random_seed data_seed manual_seed",
    "--method": "finetuning_type adapter peft_type tuning_method",
    "--method dora": "use_dora peft_use_dora",
    "--method lora": "use_peft use_lora",
    "--method full": "full_finetuning",
    "--quantize nf4": "load_in_4bit qlora use_qlora bnb_4bit_quant_type",
    "--quantize int8": "load_in_8bit",
    "--quantize": "quantization_bit quantization bits quant_type",
    "--rank": "lora_r lora_rank r lora_dim",
    "--lora-alpha": "alpha",
    "--lora-dropout": "dropout",
    "--rslora": "use_rslora peft_use_rslora",
    "--targets": "lora_target_modules target_modules lora_target lora_modules lora_target_linear",
    "--eval-every": "eval_steps evaluation_strategy eval_strategy evals_per_epoch eval_interval",
    "--early-stopping": "early_stopping_patience patience",
    "--keep best": "load_best_model_at_end",
    "--out": "output_dir output output_path save_path save_dir adapter_out",
    "--overwrite": "overwrite_output_dir force",
    "--resume": "resume_from_checkpoint auto_resume_from_checkpoints checkpoint",
    "--log-every": "logging_steps log_steps log_interval",
    "--save-every": "save_steps save_strategy saves_per_epoch save_interval",
    "--track": "report_to logger",
    "--track wandb": "wandb_project use_wandb wandb",
    "--beta": "dpo_beta pref_beta kto_beta orpo_beta rl_beta orpo_alpha kl_coef kl_loss_coef",
    "--loss": "loss_type pref_loss",
    "--group-size": "num_generations n_samples_per_prompt rollout_n",
    "--reward": "reward_funcs reward_functions reward_fn",
    "--iterations": "num_iterations ppo_epochs",
    "--epsilon": "clip_ratio cliprange clip_range",
    "--label-smoothing": "label_smoothing_factor",
    "--teacher": "teacher_model teacher_model_name_or_path teacher_name",
    "--online": "on_line",
    "--max-new-tokens": "max_tokens num_predict max_completion_length max_length",
    "--system": "system_prompt",
    "--from": "input_file prompts_file infile",
    "--push": "push_to_hub hub_model_id repo_id",
    "--tasks": "task task_list",
    "--fewshot": "num_fewshot n_shot",
    "--max-rows": "limit",
    "--scheme": "quantize quantization bits",
    "--config": "recipe yaml config_file",
    "--dry-run": "dryrun",
}
_VALUES = {
    "adamw": "adam adamw_torch adamw_torch_fused adamw_hf adamw_fused",
    "adamw8bit": "adam8bit adamw_8bit adamw_bnb_8bit adam_8bit",
    "paged-adamw": "paged_adamw_32bit paged_adam",
    "paged-adamw8bit": "paged_adamw_8bit paged_adam8bit",
    "lion": "lion_32bit",
    "lion8bit": "lion_8bit",
    "float16": "fp16 half f16",
    "bfloat16": "bf16 brainfloat16",
    "float32": "fp32 float full f32 single",
    "nf4": "4bit 4-bit 4 int4 q4 q4_k_m bnb 4bits true",
    "int8": "8bit 8-bit 8 q8 q8_0 8bits",
    "lora": "qlora peft adapter",
    "full": "full_finetune fft",
    "wsd": "warmup_stable_decay",
    "cosine": "cosine_with_restarts cosine_with_min_lr",
    "constant": "constant_with_warmup",
    "linear": "polynomial",
    "skip": "ignore drop continue warn",
    "stop": "error raise fail",
    "last": "latest final last_turn",
    "all": "all_turns every",
    "frozen": "none no false freeze",
    "sigmoid": "dpo",
    "kto": "kto_pair",
    "dequantized": "dequantised",
    "gsm8k": "gsm",
    "exact": "exact_match em",
    "messages": "openai chatml conversations chat",
    "kit": "transformers hf safetensors",
}


def _inverted(table: dict[str, str]) -> dict[str, list[str]]:
    """Return what is used here for each name that other tools use."""
    ours: dict[str, list[str]] = {}
    for own, others in table.items():
        for other in others.split():
            ours.setdefault(other, []).append(own)
    return ours


OTHER_VERBS, OTHER_FLAGS, OTHER_VALUES = map(_inverted, (_VERBS, _FLAGS, _VALUES))


def other_verb(word: str) -> ConfigError | None:
    """Return the error for a verb that other tools have, with the one to use here; None for other words."""
    usual = OTHER_VERBS.get(word.lower().lstrip("-"))
    if usual is None:
        return None
    trains = "sft, dpo, kto, orpo, reward, grpo and distill train" if usual[0].startswith("sft") else ""
    return ConfigError(f"There is no verb {word}.", expected=trains, fix=command(*usual[0].split()))


def other_flag(name: str, known: Collection[str]) -> str:
    """Return the flag of this kit for the flag or key of another tool; empty if there is none.

    Args:
        name: The other tool's flag, without hyphens in front.
        known: The flags that can be used.
    """
    candidates = OTHER_FLAGS.get(name.lower().replace("-", "_"), ())
    return next((flag for flag in candidates if flag.split()[0] in known), "")


def other_flags(words: Sequence[str], arguments: Iterable[Argument]) -> ConfigError | None:
    """Return an error that names every flag of another tool in a command line, or None if there is none.

    Args:
        words: The command line.
        arguments: What its verb takes.
    """
    known = {name for argument in arguments for name in (*argument.names, *argument.negatives)}
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    found = {flag: own for flag in flags if flag not in known and (own := other_flag(flag.strip("-"), known))}
    if not found:
        return None
    if len(found) == 1:
        return ConfigError(f"There is no flag {next(iter(found))}.", fix=next(iter(found.values())))
    fixes = (f"{own} for {flag}" for flag, own in found.items())
    return ConfigError(f"There are no flags {', '.join(found)}.", fix=", ".join(fixes))


def nearest_value(value: str, allowed: Collection[str]) -> str:
    """Return the allowed value that means the same in another tool, or is spelled most like it; empty if none is."""
    same = {one.replace("_", "-").lower(): one for one in allowed}
    word = value.lower()
    if (spelled := word.replace("_", "-")) in same:
        return same[spelled]
    means = (own for own in OTHER_VALUES.get(word, ()) if own in allowed)
    return next(means, "") or nearest(word, allowed)
