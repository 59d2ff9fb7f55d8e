"""Search good values of the main options with Optuna: `pip install optuna && python examples/search.py`.

It uses the demo world. Trials are kept in `runs/search.db`: run the script again, and the search goes on. Bad trials
are stopped early.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna

from transrec_hf import TransRecModel, TransRecTrainer, TransRecTrainingArguments, leave_one_out
from transrec_hf.data.demo import demo_config, demo_processor, demo_world


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Draws the values of a trial. Returns those of the training; `make_model` reads those of the model."""
    trial.suggest_float("hidden_dropout_prob", 0.0, 0.4)
    trial.suggest_categorical("num_hidden_layers", [1, 2])
    return {
        "learning_rate": trial.suggest_float("learning_rate", 2e-4, 1e-2, log=True),
        "tower_learning_rate": trial.suggest_float("tower_learning_rate", 1e-5, 5e-3, log=True),
        "trainable_blocks": trial.suggest_int("trainable_blocks", 0, 2),
        "weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.3, log=True),
    }


def make_model(trial: optuna.Trial | None = None) -> TransRecModel:
    """Returns the model of a trial; without a trial, a model with the default values."""
    chosen = {} if trial is None else trial.params
    return TransRecModel(
        demo_config(**{name: chosen[name] for name in ("hidden_dropout_prob", "num_hidden_layers") if name in chosen})
    )


def main(n_trials: int = 8) -> Any:
    Path("runs").mkdir(exist_ok=True)
    platform = demo_world().source
    args = TransRecTrainingArguments(
        "runs/search", num_train_epochs=4, per_device_train_batch_size=32, warmup_steps=20, disable_tqdm=True
    )
    trainer = TransRecTrainer(
        None,
        args,
        catalogue=platform.catalogue,
        split=leave_one_out(platform.sequences),
        processing_class=demo_processor(),
        model_init=make_model,
    )
    best = trainer.hyperparameter_search(
        space,
        n_trials=n_trials,
        backend="optuna",
        study_name="demo",
        storage="sqlite:///runs/search.db",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
    )
    print(f"best ndcg@10 on the validation targets: {best.objective:.3f} with {best.hyperparameters}")
    return best


if __name__ == "__main__":
    main()
