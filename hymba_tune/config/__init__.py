"""Every setting of every verb, with its default, its range and its help line. Each default is defined only here.

A field is a flag (`--max-length`), a recipe key (`max_length`) and an environment variable
(`HYMBA_TUNE_SFT_MAX_LENGTH`); a flag wins over the environment, which wins over a recipe.
"""

from hymba_tune.config.base import (
    Accuracy,
    Config,
    Keep,
    Learn,
    MetaTokens,
    Method,
    OnBadRow,
    Onto,
    ReferenceSource,
    Scheme,
    Start,
    Tracker,
    Verb,
    as_mapping,
)
from hymba_tune.config.data import DataCheckConfig, DataConvertConfig, DataPreviewConfig, DataSplitConfig
from hymba_tune.config.distill import DistillCaptureConfig, DistillConfig, TeacherOptions
from hymba_tune.config.distributed import DistributedOptions, LaunchOptions
from hymba_tune.config.grpo import GRPOConfig, RewardChoice
from hymba_tune.config.inference import ChatConfig, EvalConfig, GenerationOptions, ServeConfig
from hymba_tune.config.options import (
    AdapterOptions,
    DataOptions,
    EngineOptions,
    KeptDataOptions,
    ModelOptions,
    TrainingOptions,
)
from hymba_tune.config.orpo import ORPOConfig
from hymba_tune.config.quantize import QuantizeConfig
from hymba_tune.config.reward import RewardConfig
from hymba_tune.config.verbs import (
    DoctorConfig,
    DPOConfig,
    ExportConfig,
    KTOConfig,
    MergeConfig,
    PlanConfig,
    PreferenceConfig,
    ReferenceConfig,
    SFTConfig,
    TrainingConfig,
)

__all__ = [
    "Accuracy",
    "AdapterOptions",
    "ChatConfig",
    "Config",
    "DPOConfig",
    "DataCheckConfig",
    "DataConvertConfig",
    "DataOptions",
    "DataPreviewConfig",
    "DataSplitConfig",
    "DistillCaptureConfig",
    "DistillConfig",
    "DistributedOptions",
    "DoctorConfig",
    "EngineOptions",
    "EvalConfig",
    "ExportConfig",
    "GRPOConfig",
    "GenerationOptions",
    "KTOConfig",
    "Keep",
    "KeptDataOptions",
    "LaunchOptions",
    "Learn",
    "MergeConfig",
    "MetaTokens",
    "Method",
    "ModelOptions",
    "ORPOConfig",
    "OnBadRow",
    "Onto",
    "PlanConfig",
    "PreferenceConfig",
    "QuantizeConfig",
    "ReferenceConfig",
    "ReferenceSource",
    "RewardChoice",
    "RewardConfig",
    "SFTConfig",
    "Scheme",
    "ServeConfig",
    "Start",
    "TeacherOptions",
    "Tracker",
    "TrainingConfig",
    "TrainingOptions",
    "Verb",
    "as_mapping",
]
