"""One typed, frozen configuration for a run."""

from megatron_mdm.config.data import DataConfig, SourceConfig, TrainSourceConfig
from megatron_mdm.config.finetuning import FinetuningConfig
from megatron_mdm.config.layout import Layout, check_layout, check_model_splits, divide_model
from megatron_mdm.config.loading import dump_config, dump_recipe, load_config, parse_config
from megatron_mdm.config.model import ModelConfig
from megatron_mdm.config.objective import ObjectiveConfig
from megatron_mdm.config.optimizer import OptimizerConfig
from megatron_mdm.config.parameter_groups import ParameterGroups
from megatron_mdm.config.parameters import CONVENTIONS, ModelSize, ParameterConvention
from megatron_mdm.config.presets import expand_preset, find_convention, list_presets
from megatron_mdm.config.schedule import ScheduleConfig
from megatron_mdm.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    FaultsConfig,
    ParallelConfig,
    ValidationConfig,
)

__all__ = [
    "CONVENTIONS",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FaultsConfig",
    "FinetuningConfig",
    "Layout",
    "ModelConfig",
    "ModelSize",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterConvention",
    "ParameterGroups",
    "ScheduleConfig",
    "SourceConfig",
    "TrainSourceConfig",
    "ValidationConfig",
    "check_layout",
    "check_model_splits",
    "divide_model",
    "dump_config",
    "dump_recipe",
    "expand_preset",
    "find_convention",
    "list_presets",
    "load_config",
    "parse_config",
]
