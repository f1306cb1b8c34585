"""One typed, frozen configuration for a run."""

from megatron_mdm.config.data import DataConfig, SourceConfig, TrainSourceConfig
from megatron_mdm.config.finetuning import FinetuningConfig
from megatron_mdm.config.layout import Layout, check_layout
from megatron_mdm.config.loading import config_from_dict, dump_config, dump_recipe, load_config
from megatron_mdm.config.model import ModelConfig
from megatron_mdm.config.objective import ObjectiveConfig
from megatron_mdm.config.presets import preset_fields, preset_names
from megatron_mdm.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    FaultsConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    ValidationConfig,
)

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FaultsConfig",
    "FinetuningConfig",
    "Layout",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrainSourceConfig",
    "ValidationConfig",
    "check_layout",
    "config_from_dict",
    "dump_config",
    "dump_recipe",
    "load_config",
    "preset_fields",
    "preset_names",
]
