"""Every field of PEFT's LoraConfig: what is made of it here. A test asks the installed PEFT whether these are all.

READ        what the tensors mean hangs on it, and it is carried out
OF_TRAINING how it was trained, or how PEFT computes the same; the tensors say the rest
REFUSED     the tensors mean something else then, and what
"""

from __future__ import annotations

READ = (
    "alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha",
    "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern", "revision", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
)  # fmt: skip
OF_TRAINING = (
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "runtime_config", "velora_config",
)  # fmt: skip
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA changes the tokens from its invocation on, and no others",
    "arrow_config": "Arrow chooses among adapters at every token",
    "bdlora_config": "its factors are blocks of matrices",
    "kasa_config": "KaSA took singular directions out of the base's weights",
    "layer_replication": "layers of the base stand in the model several times, so the base is another one",
    "monteclora_config": "its weights are drawn at random",
    "use_bdlora": "its factors are blocks of matrices",
    "use_qalora": "its inputs are averaged in groups",
}
# Starts that also changed the base model's weights, so that the saved factors belong to another base.
CHANGED_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
