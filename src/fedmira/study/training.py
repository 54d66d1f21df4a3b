"""How the clients of a method train: the config's `training`, with what the method's entry changes, as plain values."""

from collections.abc import Sequence

from fedmira.adapters.optim import Optimizer, adamw, sgd
from fedmira.config.sections import Config, SchedulerKwargs, TrainingConfig
from fedmira.data.batches import ClientData
from fedmira.engine.rates import Schedule
from fedmira.engine.run import Course
from fedmira.engine.tools import Training
from fedmira.errors import ConfigError, MethodError
from fedmira.methods.base import Method


def optimizer_of(section: TrainingConfig) -> Optimizer:
    """Return the clients' optimizer."""
    if section.optimizer == "sgd":
        return sgd(momentum=section.momentum, weight_decay=section.weight_decay)
    return adamw(betas=section.betas, eps=section.eps, weight_decay=section.weight_decay)


def schedule_of(section: TrainingConfig, rounds: int) -> Schedule:
    """Return the schedule of the learning rate in a run of `rounds` rounds."""
    limits = section.lr_scheduler_kwargs or SchedulerKwargs()
    return Schedule(
        kind=section.lr_scheduler_type,
        over=section.lr_scheduler_over,
        rounds=rounds,
        warmup=section.warmup_steps or section.warmup_ratio,
        min_lr=limits.min_lr,
        min_lr_rate=limits.min_lr_rate,
    )


def training_of(config: Config, seed: int, section: TrainingConfig | None = None) -> Training:
    """Return how clients train, as plain values. section: of one method; None = the study's."""
    section = config.training if section is None else section
    return Training(
        optimizer=optimizer_of(section),
        learning_rate=section.learning_rate,
        batch_size=section.batch_size,
        local_steps=section.local_steps,
        local_epochs=section.local_epochs,
        max_grad_norm=section.max_grad_norm,
        keep_optimizer=section.keep_optimizer,
        dropout=config.lora.lora_dropout,
        seed=seed,
        accumulation=section.gradient_accumulation_steps,
        schedule=schedule_of(section, config.federation.rounds),
        recompute=None if section.gradient_checkpointing == "auto" else section.gradient_checkpointing,
    )


def course_of(config: Config, section: TrainingConfig, seed: int) -> Course:
    """Return how long a run is, when it is measured and what of it is kept, as plain values. section: of its method."""
    federation, evaluation = config.federation, config.evaluation
    stopping = federation.early_stopping
    return Course(
        federation.rounds,
        evaluation.every,
        seed,
        section.learning_rate,
        schedule=schedule_of(section, federation.rounds),
        keep=evaluation.keep,
        patience=None if stopping is None else stopping.patience,
        threshold=0.0 if stopping is None else stopping.threshold,
    )


def check_validation(config: Config, clients: Sequence[ClientData]) -> None:
    """Raise ConfigError if a round is to be chosen by validation losses and no client has a validation example."""
    asks = []
    if config.evaluation.keep == "best":
        asks.append("evaluation.keep: best")
    if config.federation.early_stopping is not None:
        asks.append("federation.early_stopping")
    if asks and not any(client.validation for client in clients):
        faults = [
            f"{ask} needs a validation loss, and no client has a validation example (data.split.validation: "
            f"{config.data.split.validation:g}); raise that fraction, name a data.split_column with validation "
            "examples, or remove this key"
            for ask in asks
        ]
        raise ConfigError(faults)


def check_least_rate(method: Method, training: TrainingConfig, where: str) -> None:
    """Raise MethodError if a schedule ends above the learning rate that a method has of its own."""
    peak, least = method.regime.learning_rate, schedule_of(training, 1).min_lr
    if peak is not None and least is not None and least > peak:
        raise MethodError(
            f"{where}: learning_rate = {peak:g} is below training.lr_scheduler_kwargs.min_lr = {least:g}; lower "
            "min_lr, for this method alone in its `training:`, or give min_lr_rate"
        )


def check_optimizer(method: Method, training: TrainingConfig, where: str) -> None:
    """Raise MethodError if clients have another optimizer than a method's own equations need."""
    if method.regime.optimizer == "any":
        return
    found = "" if training.optimizer == "sgd" else f"optimizer: {training.optimizer}"
    if not found and training.momentum:
        found = f"momentum: {training.momentum:g}"
    if found:
        raise MethodError(
            f"{where}: '{method.name}' reads gradients off the steps that clients took, which works for plain SGD "
            f"alone, and training has {found}; for this method alone write `training: {{optimizer: sgd, momentum: 0, "
            "learning_rate: ...}` in its entry, with a learning rate for SGD"
        )
