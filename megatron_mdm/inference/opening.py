"""Opens the model that a command line names: an export, or a checkpoint over the ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from megatron_mdm.checkpoint.manifest import RAW
from megatron_mdm.config.objective import RunWay
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import FLATTENED
from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.core.remarks import warn
from megatron_mdm.corpus.conversations import PLAIN_CHAT_TEMPLATE, ChatTemplate
from megatron_mdm.corpus.tokenizer_settings import read_chat_settings
from megatron_mdm.distributed.processes import read_world_size
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.models import TextModel


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model.

    Attributes:
        model: Folder of an exported model; this or --checkpoint.
        checkpoint: A checkpoint, or a run: its latest.
        run_as: Of a mixture of objectives: ar, the next token; mdm, unmasking; prefix, the next
            token, with a prompt whose tokens see each other. None: as its run says.
        weights: With --checkpoint: raw, or the name of an average of the weights that it holds.
        tokenizer: With --checkpoint: folder, file or hub name; default: the run's.
        tensor_parallel: With --checkpoint: ranks of a layer.
        pipeline_parallel: With --checkpoint: stages.
    """

    model: Path | None = None
    checkpoint: Path | None = None
    run_as: RunWay | None = None
    weights: str = RAW
    tokenizer: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @contextlib.contextmanager
    def open(self) -> Iterator[TextModel]:
        """Opens the model.

        Raises:
            MdmError: There is not one model, or it cannot be opened.
        """
        self._check_one()
        if self.checkpoint is not None:
            quiet_engines()
            # Megatron-Core takes seconds to import; exported models do without.
            from megatron_mdm.inference.checkpoint import open_checkpoint

            with open_checkpoint(
                self.checkpoint,
                way=self.run_as,
                weights=self.weights,
                tokenizer=self.tokenizer,
                tensor_parallel=self.tensor_parallel,
                pipeline_parallel=self.pipeline_parallel,
            ) as trained:
                yield trained
        elif self.model is not None:
            self._check_one_process()
            yield ExportedModel(self.model, way=self.run_as)

    def open_template(self) -> ChatTemplate:
        """Opens the template by which conversations are told to the model.

        Returns:
            The one that travels with the model, or else, with a warning, the plain one.

        Raises:
            MdmError: There is not one model, or its tokenizer cannot be found.
        """
        self._check_one()
        if self.checkpoint is not None:
            from megatron_mdm.inference.checkpoint import open_run_template

            template, stated = open_run_template(self.checkpoint, self.tokenizer)
        else:
            # Not by its name, for which transformers would look into the model's configuration.
            settings = read_chat_settings(self.model or Path())
            stated = settings.pop("chat_template", None)
            template = ChatTemplate(
                PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), **settings),
                PLAIN_CHAT_TEMPLATE,
            )
        if stated is not None:
            template.text = stated
        elif template.text == PLAIN_CHAT_TEMPLATE and os.environ.get("RANK", "0") == "0":
            warn(
                f"{self.model or self.checkpoint} names no chat template: messages are told as "
                "'User: ...' and 'Assistant: ...', which a model has to be fine-tuned on."
            )
        return template

    def _check_one(self) -> None:
        if (self.model is None) == (self.checkpoint is None):
            raise ConfigError("There must be one model: give --model or --checkpoint.")

    def _check_one_process(self) -> None:
        given = {
            "weights": RAW,
            "tokenizer": None,
            "tensor_parallel": 1,
            "pipeline_parallel": 1,
        }
        for name, default in given.items():
            if (value := getattr(self, name)) != default:
                raise ConfigError(
                    f"--{name.replace('_', '-')}={value} belongs to --checkpoint: leave it out, "
                    "or give the checkpoint instead of --model."
                )
        if read_world_size() > 1:
            raise ConfigError(
                f"--model runs in one process, but {read_world_size()} were launched: start it "
                "without a launcher, or give the checkpoint as --checkpoint."
            )


NO_MODEL = ModelChoice()
