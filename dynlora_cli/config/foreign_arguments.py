"""Arguments of transformers' Trainer that have no counterpart here: lines of the table in foreign_names.py."""

from __future__ import annotations

ARGUMENTS = """
lr_scheduler_kwargs               transformers   !the course of the rate has no further settings
adam_beta1                        transformers   !AdamW with beta1 0.9
adam_beta2                        transformers   !AdamW with beta2 0.999
adam_epsilon                      transformers   !AdamW with eps 1e-8
optim_args                        transformers   !AdamW with its usual numbers
optim_target_modules              transformers   !AdamW for all that trains
neftune_noise_alpha               transformers   !there is no noise on embeddings
label_smoothing_factor            transformers   !the targets are not smoothed
length_column_name                transformers   -rows of similar length always share a batch
remove_unused_columns             transformers   -columns that are not read are named
dataloader_num_workers            transformers   -rows are in memory
dataloader_prefetch_factor        transformers   -rows are in memory
dataloader_pin_memory             transformers   -rows are in memory
dataloader_persistent_workers     transformers   -rows are in memory
dataloader_drop_last              transformers   !the last rows of an epoch are trained on too
dataset_num_proc                  transformers   -large files are read on all cores (dataset.workers)
ddp_backend                       transformers   -give `--devices N` on the command line
ddp_find_unused_parameters        transformers   -give `--devices N` on the command line
local_rank                        transformers   -give `--devices N` on the command line
fsdp_config                       transformers   -with `train.shard_base: true` layers are sharded as they need it
fsdp_transformer_layer_cls_to_wrap transformers   -with `train.shard_base: true` layers are sharded as they need it
gradient_checkpointing_kwargs     transformers   -how activations are computed again does not change what is trained
torch_compile_backend             transformers   -the way of compiling does not change what is trained
torch_compile_mode                transformers   -the way of compiling does not change what is trained
use_liger_kernel                  transformers   -loss and layers are fused already
enable_liger_kernel               transformers   -loss and layers are fused already
logging_dir                       transformers   -metrics lie in the run folder
logging_first_step                transformers   -the first step is logged
logging_strategy                  transformers   -log lines come every `train.log_steps`
log_level                         transformers   -nothing of the result depends on it
disable_tqdm                      transformers   -there is no animation where stderr is no terminal
run_name                          transformers   -trackers are given the name of the run folder
push_to_hub                       transformers   !adapters are not uploaded from training
hub_model_id                      transformers   !adapters are not uploaded from training
hub_token                         transformers   !adapters are not uploaded from training
hub_strategy                      transformers   !adapters are not uploaded from training
hub_private_repo                  transformers   !adapters are not uploaded from training
save_only_model                   transformers   -checkpoints are for going on after a stop
save_safetensors                  transformers   -always
save_on_each_node                 transformers   -one process writes
eval_on_start                     transformers   -always
eval_accumulation_steps           transformers   -evaluation keeps no logits
eval_delay                        transformers   -held-out rows are measured at the start as well
include_num_input_tokens_seen     transformers   -always
include_tokens_per_second         transformers   -always
average_tokens_across_devices     transformers   -a token weighs the same on all devices
greater_is_better                 transformers   -the best state is the one with the lowest held-out loss
use_cpu                           transformers   -the machine's device is found
no_cuda                           transformers   -the machine's device is found
full_determinism                  transformers   -runs repeat on one machine; CUDA's own choices stay
auto_find_batch_size              transformers   -`dynlora train --dry-run` says what fits
"""
