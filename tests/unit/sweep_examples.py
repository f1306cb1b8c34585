"""A small sweep, and a stand-in for training that ends at once in whatever way a test wants."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from megatron_mdm.config import dump_config
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.reporting.metrics import MetricsLogger
from megatron_mdm.studies.sweeps.grid import load_sweep
from megatron_mdm.studies.sweeps.run_sizes import size_runs
from megatron_mdm.studies.sweeps.run_states import read_state

SEQ, BATCH, STEPS = 8, 4, 6

# What the seed says: 0: ends well; 1: an error; 2: dies; 3: does not hear SIGTERM.
STAND_IN = """
import json, os, pathlib, signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
folder = pathlib.Path(config["run"]["dir"])
seen = {
    "cores": sorted(os.sched_getaffinity(0)),
    "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "hears": signal.getsignal(signal.SIGINT) is not signal.SIG_IGN,
}
(folder / "seen.json").write_text(json.dumps(seen))
seed = config["run"]["seed"]
if seed == 1:
    sys.exit("error: bad luck: try again.")
if seed == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 3:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "deaf").touch()
    time.sleep(60)
ledger = {"step": 6, "num_steps": 6, "planned": [{"num_windows": 10}]}
(folder / "ledger.json").write_text(json.dumps(ledger))
print("saved")
"""


def write_sweep(root: Path, name: str = "sweep", **sections):
    """A sweep over seeds whose training data holds ten windows and three tokens more."""
    if not (root / "train.bin").exists():
        with ShardWriter(root / "train", np.uint16) as writer:
            writer.add_document(np.arange(10 * SEQ + 3))
            writer.finish()
    base = {
        "run": {"dir": "unset"},
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "ffn_hidden_size": 24,
            "vocab_size": 100,
            "tie_embeddings": True,
        },
        "data": {"train": [{"path": str(root / "train")}], "seq_length": SEQ},
        "batch": {"micro_batch_size": 2, "global_batch_size": BATCH},
        "schedule": {"steps": STEPS},
    }
    (root / "base.yaml").write_text(yaml.safe_dump(base))
    tree = {"base": str(root / "base.yaml"), "dir": str(root / "runs"), **sections}
    path = root / f"{name}.yaml"
    # The order of axes counts.
    path.write_text(yaml.safe_dump({"axes": {"run.seed": [0]}} | tree, sort_keys=False))
    return load_sweep(path)


def begin(run, records=(), attempt=None, saved=None, windows=()):
    """Leaves in a run's folder what a run and its sweep do."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(dump_config(run.config))
    logger = MetricsLogger(run.folder, resume_step=None)
    for record in records:
        logger.log(record)
    for judged in windows:
        logger.log_windows(judged.as_record())
    logger.close()
    if attempt is not None:
        (run.folder / "attempt.json").write_text(json.dumps({"started": 1.0, **attempt}))
    if saved is not None:
        ledger = {"step": saved, "num_steps": STEPS, "planned": [{"num_windows": 10}]}
        (run.folder / "ledger.json").write_text(json.dumps(ledger))


def state_of(run):
    return read_state(*size_runs([run]))
