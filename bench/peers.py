"""One training of the benchmark, in a process and an environment of its own: `python -m bench.peers NAME JOB REPORT STARTED`.

Each library is asked for the same job in its own words; what the job does not say is left to the library's defaults.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from bench.meter import Meter

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Job = dict[str, Any]  # Any: JSON


def common(job: Job) -> dict[str, Any]:
    """What makes it the same job, in the words of transformers' TrainingArguments."""
    return {
        "output_dir": str(Path(job["folder"]) / "out"),
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "seed": job["seed"],
        "report_to": "none",
        "logging_steps": 1,
    }


def lora(job: Job) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=job["rank"], lora_alpha=job["rank"], lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")


def conversations(job: Job) -> Any:
    from datasets import load_dataset

    def turns(row: dict[str, str]) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }

    return load_dataset("json", data_files=job["train"], split="train").map(turns)


# --- the libraries ---------------------------------------------------------------


def ours(job: Job, meter: Meter) -> None:
    """Two stages, each a process of its own; this one is the training."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401

    import tuneloop_trainer.stages.train
    import tuneloop_trainer.training.callbacks
    import tuneloop_trainer.training.trainer  # noqa: F401

    stage(job, meter, "train")


def stage(job: Job, meter: Meter, name: str) -> None:
    from tuneloop_trainer.contract import RunConfig, Stage
    from tuneloop_trainer.interrupts import Interrupts
    from tuneloop_trainer.progress import ProgressWriter
    from tuneloop_trainer.worker import run

    config = RunConfig.model_validate(job["run_config"])
    meter.imports_done()
    result = run(Stage(name), config, ProgressWriter(Path(job["folder"]) / "progress.json", Stage(name), "bench"), Interrupts())
    if result.exit_code:
        raise SystemExit(result.message)


def trl_default(job: Job, meter: Meter) -> None:
    """As TRL's quick start writes it: the model's name, the rows, and what the job asks for."""
    import peft  # noqa: F401
    from trl import SFTConfig, SFTTrainer

    meter.imports_done()
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(**common(job), per_device_train_batch_size=job["batch"], use_cpu=True),
        train_dataset=conversations(job),
        peft_config=lora(job),
    )
    trainer.train()
    trainer.save_model(job["adapter"])


def trl_tuned(job: Job, meter: Meter) -> None:
    """With our dtype, micro-batch, saving, and without checkpointing activations."""
    import peft  # noqa: F401
    import torch
    from trl import SFTConfig, SFTTrainer

    meter.imports_done()
    arguments = SFTConfig(
        **common(job) | {"save_strategy": "steps", "save_steps": job["steps"]},
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["batch"] // job["micro_batch"],
        gradient_checkpointing=False,
        padding_free=job["padding_free"],
        model_init_kwargs={"dtype": torch.bfloat16},
        bf16=True,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(model=job["model"], args=arguments, train_dataset=conversations(job), peft_config=lora(job))
    trainer.train()
    trainer.save_model(job["adapter"])


def llamafactory(job: Job, meter: Meter) -> None:
    """Its own example for LoRA SFT, with the job's numbers."""
    from llamafactory.train.tuner import run_exp

    meter.imports_done()
    folder = Path(job["folder"])
    columns = {"columns": {"prompt": "prompt", "response": "completion"}, "file_name": Path(job["train"]).name}
    (Path(job["train"]).parent / "dataset_info.json").write_text(json.dumps({"rows": columns}))
    run_exp(
        common(job)
        | {
            "output_dir": job["adapter"],
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": job["rank"],
            "lora_alpha": job["rank"],
            "lora_target": "all",
            "model_name_or_path": job["model"],
            "dataset": "rows",
            "dataset_dir": str(Path(job["train"]).parent),
            "template": "smollm2",
            "default_system": job["system"],
            "cutoff_len": 1024,
            "per_device_train_batch_size": job["batch"],
            "bf16": True,
            "use_cpu": True,
            "save_strategy": "no",
            "overwrite_cache": True,
            "cache_dir": str(folder / "cache"),
        }
    )


def axolotl(job: Job, meter: Meter) -> None:
    """Its own example for LoRA SFT on chat rows, with the job's numbers. It has no word for a CPU: transformers
    is told, and its own kernels, which need CUDA, are left out."""
    import yaml
    from axolotl.cli.train import do_cli
    from transformers import TrainingArguments

    checked = TrainingArguments.__post_init__

    def on_cpu(arguments: Any) -> None:
        arguments.use_cpu = True
        checked(arguments)

    TrainingArguments.__post_init__ = on_cpu
    meter.imports_done()
    folder = Path(job["folder"])
    config = common(job) | {
        "base_model": job["model"],
        "datasets": [{"path": job["messages"], "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": job["adapter"],
        "val_set_size": 0.0,
        "sequence_len": 1024,
        "adapter": "lora",
        "lora_r": job["rank"],
        "lora_alpha": job["rank"],
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "micro_batch_size": job["batch"],
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "bf16": True,
        "save_strategy": "no",
    }
    for name in ("lr_scheduler_type", "report_to"):
        config.pop(name)
    (folder / "axolotl.yaml").write_text(yaml.safe_dump(config))
    do_cli(config=str(folder / "axolotl.yaml"))


def kaito(job: Job, meter: Meter) -> None:
    """KAITO's tuning script as its image runs it, with its own template of arguments and the job's numbers. Rows go one by one, as its
    template has them (its collator fails on more); it sets a CUDA device, which does nothing here."""
    import peft  # noqa: F401
    import torch
    import trl  # noqa: F401
    import yaml

    meter.imports_done()
    folder, source = Path(job["folder"]), job["kaito"]
    settings = {
        "ModelConfig": {
            "pretrained_model_name_or_path": job["model"],
            "torch_dtype": "bfloat16",
            "local_files_only": True,
            "device_map": "cpu",
        },
        "QuantizationConfig": {"load_in_4bit": False},
        "LoraConfig": {"r": job["rank"], "lora_alpha": job["rank"], "lora_dropout": 0.0, "target_modules": TARGETS},
        "TrainingArguments": common(job)
        | {
            "output_dir": job["adapter"],
            "ddp_find_unused_parameters": False,
            "save_strategy": "no",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": job["batch"],
            "use_cpu": True,
        },
        "DataCollator": {"mlm": True},
        "DatasetConfig": {"shuffle_dataset": True, "train_test_split": 1, "dataset_extension": "json"},
    }
    (folder / "kaito.yaml").write_text(yaml.safe_dump({"training_config": settings}))
    rows = folder / "kaito-rows"
    rows.mkdir()
    (rows / "rows.json").write_bytes(Path(job["messages"]).read_bytes())
    os.environ |= {"YAML_FILE_PATH": str(folder / "kaito.yaml"), "DATASET_FOLDER_PATH": str(rows)}
    torch.cuda.set_device = lambda *_: None
    sys.path.insert(0, source)
    sys.argv = ["fine_tuning.py"]
    runpy.run_path(str(Path(source) / "fine_tuning.py"), run_name="__main__")


RUNS = {run.__name__: run for run in (ours, trl_default, trl_tuned, llamafactory, axolotl, kaito)}


def main() -> None:
    name, job_file, report, started = sys.argv[1:]
    job: Job = json.loads(Path(job_file).read_text())
    meter = Meter(float(started))
    if name == "prepare":
        return stage(job, meter, "prepare")
    meter.install()
    RUNS[name](job, meter)
    meter.write(Path(report))


if __name__ == "__main__":
    main()
