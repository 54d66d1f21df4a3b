"""Other spellings that the field has for keys of a config, so that an unknown key leads to the one that is meant."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from fedmira.errors import nearest

# A key of ours -> what other programs and papers call it; in small letters, words joined by _.
MEANINGS: Mapping[str, str] = {
    "r": "rank lora_r lora_rank lora_dim rank_dim",
    "lora_alpha": "alpha scaling scale",
    "lora_dropout": "dropout",
    "target_modules": "targets target modules lora_target lora_target_modules layers",
    "base_model": "model_name model_name_or_path name path base pretrained checkpoint hf_model model_id model_path",
    "dtype": "torch_dtype precision fp16 bf16",
    "output_dir": "output out output_folder save_dir log_dir results_dir out_dir output_path",
    "seeds": "seed random_seed random_state",
    "seed": "seeds random_seed random_state",
    "path": "dataset data_path dataset_name data_dir file files train_file name dataset_path data",
    "max_length": "max_len seq_len seq_length sequence_length max_seq_len max_seq_length cutoff_len block_size "
    "model_max_length context_length",
    "delimiter": "sep separator",
    "encoding": "charset codec",
    "template": "prompt_template chat_template prompt_style",
    "split_column": "splits split_col split_by",
    "validation": "val valid dev val_split val_size validation_split validation_size",
    "test": "test_split test_size eval",
    "by": "client client_column client_id column key partition_by group_by id",
    "per_group": "clients_per_group per_value",
    "first": "num_clients n_clients limit max_clients clients number k",
    "groups": "group group_column",
    "partitioner": "partition partitioning distribution split skew",
    "num_partitions": "num_clients clients partitions n_clients n parts",
    "partition_by": "by column label label_column class_column",
    "alpha": "beta concentration dirichlet_alpha",
    "clients": "client partition",
    "subsample": "fraction sample",
    "rounds": "num_rounds n_rounds communication_rounds comm_rounds global_rounds global_epochs t epochs steps",
    "participation": "fraction fraction_fit client_fraction clients_per_round sample_rate participation_rate "
    "join_ratio c frac sampled",
    "cohort": "clients_at_once parallel num_parallel",
    "engine": "backend executor runner simulator",
    "workers": "num_workers actors num_actors gpus num_gpus processes nproc",
    "address": "ray_address cluster host",
    "local_epochs": "epochs num_epochs num_train_epochs e local_ep epoch",
    "local_steps": "steps max_steps num_steps iterations iters local_iters inner_steps",
    "batch_size": "bs batch per_device_train_batch_size train_batch_size micro_batch_size local_bs b",
    "optimizer": "optim opt optimiser",
    "learning_rate": "lr eta local_lr client_lr base_lr step_size",
    "server_learning_rate": "lr server_lr eta_g global_lr",
    "weight_decay": "wd decay l2",
    "max_grad_norm": "clip grad_clip gradient_clipping clip_grad_norm max_norm gradient_clip_val clip_norm grad_norm",
    "eps": "epsilon adam_epsilon",
    "betas": "beta adam_betas adam_beta1 beta1 adam_beta2 beta2",
    "momentum": "mom sgd_momentum",
    "lr_scheduler_type": "scheduler lr_scheduler schedule lr_schedule scheduler_type",
    "lr_scheduler_kwargs": "scheduler_kwargs lr_schedule_kwargs",
    "warmup_steps": "warmup num_warmup_steps warmup_rounds",
    "warmup_ratio": "warmup_rate warmup_fraction warmup_proportion",
    "gradient_accumulation_steps": "accumulate_grad_batches grad_accum grad_accumulation accumulation_steps",
    "privacy": "dp differential_privacy dp_sgd dpsgd",
    "noise_multiplier": "sigma noise noise_scale noise_std",
    "epsilon": "eps target_epsilon budget",
    "delta": "target_delta",
    "early_stopping": "early_stop earlystopping stop_early",
    "patience": "early_stopping_patience",
    "threshold": "early_stopping_threshold min_delta tolerance",
    "keep": "load_best_model_at_end best select",
    "metrics": "metric scores",
    "every": "eval_every interval freq frequency eval_steps eval_interval",
    "max_new_tokens": "new_tokens max_tokens gen_length max_gen_len generation_max_length",
    "max_examples": "limit max_samples max_eval_samples num_examples",
    "methods": "method algorithm algorithms strategy strategies aggregator",
    "lambda": "lam lmbda reg coupling alpha strength mu",
    "mu": "lambda lam proximal_mu prox reg",
    "eta": "lr step_size server_lr",
    "graph": "similarity adjacency topology",
    "neighbours": "neighbors neighbor neighbour",
    "normalise": "normalize norm normalization normalisation",
    "name": "type kind id",
    "kind": "type name",
    "report_to": "logger loggers tracker trackers log_to logging",
    "data": "dataset datasets",
    "model": "base base_model backbone",
    "lora": "adapter adapters peft",
    "federation": "federated fl",
    "training": "train trainer train_args training_args",
    "evaluation": "eval evaluate",
}
CLOSE = 0.75  # share of equal letters from which on a key is misspelt, not another word
_KEYS: dict[str, list[str]] = {}
for _key, _others in MEANINGS.items():
    for _other in _others.split():
        _KEYS.setdefault(_other, []).append(_key)


def meant(word: str, allowed: Sequence[str], elsewhere: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return " (did you mean 'x'?)" for the key that an unknown one stands for, or an empty string.

    First one of `allowed` with that meaning, then one with nearly the same letters, then one of another section
    (elsewhere: section -> its keys), then the most similar one.
    """
    plain = word.lower().replace("-", "_")
    for key in _KEYS.get(plain, ()):
        if key in allowed:
            return f" (did you mean '{key}'?)"
    if get_close_matches(plain, [key.lower() for key in allowed], n=1, cutoff=CLOSE):
        return nearest(word, allowed)
    for key in (plain, *_KEYS.get(plain, ())):
        for section, keys in (elsewhere or {}).items():
            if key in keys:
                return f" (did you mean '{section}{key}'?)"
    return nearest(word, allowed)
