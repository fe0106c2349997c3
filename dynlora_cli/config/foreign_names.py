"""Names and values known from other tools, and what they are called here; the values are in foreign_values.py.

They are answered, never accepted: a silent rename would hide that the meaning differs in places. A line of the tables
holds the foreign name, the tool that is best known for it, and our name. A remark follows `;`. An answer that begins
with `-` says why nothing is lost without a counterpart, and with `!` what is. `own` marks names that come from nowhere
in particular. Names that one tool alone has are in its importer (drafts/importers), and are answered by the same lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from dynlora_cli import plugins
from dynlora_cli.config.foreign_arguments import ARGUMENTS
from dynlora_cli.config.foreign_values import VALUES

_KEYS = """
base_model                        axolotl        model.name_or_path
model_name_or_path                transformers   model.name_or_path
model_name                        Unsloth        model.name_or_path
model_id                          ms-swift       model.name_or_path
model_path                        mlx-lm         model.name_or_path
pretrained_model_name_or_path     transformers   model.name_or_path
checkpoint_dir                    litgpt         model.name_or_path
checkpointer                      torchtune      model.name_or_path
checkpointer.checkpoint_dir       torchtune      model.name_or_path
model.name                        own            model.name_or_path
model.path                        own            model.name_or_path
model._component_                 torchtune      model.name_or_path
revision_of_model                 axolotl        model.revision
model_revision                    TRL            model.revision
task_type                         PEFT           model.task
bf16                              transformers   model.dtype: bfloat16
fp16                              transformers   model.dtype: float16
pure_bf16                         LLaMA-Factory  model.dtype: bfloat16
tf32                              axolotl        -PyTorch's own setting decides
torch_dtype                       transformers   model.dtype
precision                         litgpt         model.dtype
quantization_bit                  LLaMA-Factory  model.load_in_4bit; or `model.load_in_8bit`
quant_bits                        ms-swift       model.load_in_4bit; or `model.load_in_8bit`
quantize                          litgpt         model.load_in_4bit
qlora                             own            model.load_in_4bit: true; with `adapter.variant: lora`
quantization_type                 LLaMA-Factory  model.bnb_4bit_quant_type
double_quantization               LLaMA-Factory  model.bnb_4bit_use_double_quant
use_bnb_nested_quant              TRL            model.bnb_4bit_use_double_quant
bnb_config_kwargs                 axolotl        model.bnb_4bit_quant_type; and `model.bnb_4bit_use_double_quant`
bnb_4bit_compute_dtype            transformers   model.dtype
flash_attention                   axolotl        model.attn_implementation: flash_attention_2
flash_attn                        LLaMA-Factory  model.attn_implementation
sdp_attention                     axolotl        model.attn_implementation: sdpa
xformers_attention                axolotl        model.attn_implementation: sdpa
use_flash_attention_2             transformers   model.attn_implementation: flash_attention_2
class_prompt                      diffusers      model.prior_caption
with_prior_preservation           diffusers      model.prior_caption; which switches it on
num_class_images                  diffusers      model.prior_pictures
prior_loss_weight                 diffusers      model.prior_weight
instance_prompt                   diffusers      model.caption
instance_data_dir                 diffusers      dataset.train; each item has its `path`
data                              litgpt         dataset
datasets                          axolotl        dataset.train
dataset_name                      TRL            dataset.train
dataset_dir                       LLaMA-Factory  dataset.train; each item has its `path`
dataset.path                      own            dataset.train
dataset._component_               torchtune      dataset.train
dataset.source                    torchtune      dataset.train
data.class_path                   litgpt         dataset.train; its items have a `format`
data_files                        transformers   dataset.train; each item has its `path`
train_file                        transformers   dataset.train
dataset_text_field                TRL            dataset.train; as `columns: {text: NAME}` of an item
dataset_config                    TRL            dataset.train; as `name` of an item
dataset_train_split               TRL            dataset.train; as `split` of an item
dataset.train.type                axolotl        dataset.train; as `format` of an item
dataset.train.ds_type             axolotl        dataset.train; the file's ending tells
dataset.train.data_files          axolotl        dataset.train; as `path` of an item
dataset.train.field_messages      axolotl        dataset.train; as `columns: {messages: NAME}` of an item
dataset.train.num_samples         LLaMA-Factory  dataset.train; as `rows` of an item
interleave_probs                  LLaMA-Factory  dataset.train; as `weight` of an item: how often its rows come up
interleave_prob                   ms-swift       dataset.train; as `weight` of an item: how often its rows come up
mix_strategy                      LLaMA-Factory  dataset.train; as `weight` of an item: how often its rows come up
stopping_strategy                 ms-swift       dataset.train; as `weight` of an item: how often its rows come up
shuffle_merged_datasets           axolotl        dataset.shuffle
curriculum_sampling               axolotl        dataset.shuffle: false
dataset_streaming                 TRL            dataset.streaming
buffer_size                       LLaMA-Factory  dataset.shuffle_buffer
shuffle_buffer_size               ms-swift       dataset.shuffle_buffer
streaming_multipack_buffer_size   axolotl        dataset.shuffle_buffer
disable_shuffling                 LLaMA-Factory  dataset.shuffle: false
dataset_shuffle                   ms-swift       dataset.shuffle
train_dataloader_shuffle          ms-swift       dataset.shuffle
val_set_size                      axolotl        dataset.val_size
test_split_size                   TRL            dataset.val_size
split_dataset_ratio               ms-swift       dataset.val_size
val_split_fraction                litgpt         dataset.val_size
data.val_split_fraction           litgpt         dataset.val_size
test_datasets                     axolotl        dataset.val
eval_dataset                      TRL            dataset.val
val_dataset                       ms-swift       dataset.val
validation_file                   transformers   dataset.val
dataset_test_split                TRL            dataset.val; as `split` of an item
cutoff_len                        LLaMA-Factory  dataset.max_length
sequence_len                      axolotl        dataset.max_length
max_seq_length                    Unsloth        dataset.max_length
max_seq_len                       torchtune      dataset.max_length
tokenizer.max_seq_len             torchtune      dataset.max_length
block_size                        transformers   dataset.max_length
sample_packing                    axolotl        dataset.packing
neat_packing                      LLaMA-Factory  dataset.packing
packed                            torchtune      dataset.packing
dataset.packed                    torchtune      dataset.packing
pad_to_sequence_len               axolotl        -batches are padded to their longest row
group_by_length                   transformers   -rows of similar length always share a batch
train_on_inputs                   axolotl        dataset.train_on: all
train_on_input                    torchtune      dataset.train_on: all
train_on_prompt                   LLaMA-Factory  dataset.train_on: all
completion_only_loss              TRL            dataset.train_on: completion
assistant_only_loss               TRL            dataset.train_on: assistant
mask_prompt                       mlx-lm         dataset.train_on: completion
data.mask_prompt                  litgpt         dataset.train_on: completion
mask_history                      LLaMA-Factory  !every answer of the assistant carries loss
excess_length_strategy            axolotl        dataset.overlong
truncation_mode                   TRL            dataset.overlong
truncation_strategy               ms-swift       dataset.overlong
use_chat_template                 ms-swift       dataset.chat
apply_chat_template               lm-eval        dataset.chat
template                          LLaMA-Factory  dataset.chat_template
chat_template_jinja               axolotl        dataset.chat_template
chat_template_path                TRL            dataset.chat_template
prompt_template                   torchtune      dataset.chat_template
prompt_style                      litgpt         dataset.chat_template
data.prompt_style                 litgpt         dataset.chat_template
enable_thinking                   LLaMA-Factory  dataset.chat_template_kwargs: {enable_thinking: true}
preserve_thinking                 LLaMA-Factory  dataset.chat_template_kwargs: {preserve_thinking: true}
default_system                    LLaMA-Factory  dataset.system
finetuning_type                   LLaMA-Factory  adapter.variant
train_type                        ms-swift       adapter.variant
tuner_type                        ms-swift       adapter.variant
fine_tune_type                    mlx-lm         adapter.variant
peft_type                         PEFT           adapter.variant
use_dora                          PEFT           adapter.variant: dora
peft_use_dora                     axolotl        adapter.variant: dora
use_rslora                        PEFT           adapter.scaling: rslora, with a number as `alpha`
loraplus_lr_ratio                 PEFT           train.lora_plus_ratio
peft_use_rslora                   axolotl        adapter.scaling: rslora, with a number as `alpha`
lora_alpha                        PEFT           adapter.alpha
lora_dropout                      PEFT           adapter.dropout
lora_target_modules               axolotl        adapter.target_modules
lora_target_linear                axolotl        adapter.target_modules: all-linear
lora_target                       LLaMA-Factory  adapter.target_modules
lora_attn_modules                 torchtune      adapter.target_modules
apply_lora_to_mlp                 torchtune      adapter.target_modules: all-linear
apply_lora_to_output              torchtune      !to adapt the output head, name it in `adapter.target_modules`
lora_query                        litgpt         adapter.target_modules
lora_key                          litgpt         adapter.target_modules
lora_value                        litgpt         adapter.target_modules
lora_projection                   litgpt         adapter.target_modules
lora_mlp                          litgpt         adapter.target_modules
lora_head                         litgpt         adapter.target_modules
lora_layers                       mlx-lm         adapter.target_modules
num_layers                        mlx-lm         adapter.target_modules; pruning finds the layers that matter
layers_to_transform               PEFT           adapter.target_modules; with globs
exclude_modules                   PEFT           adapter.target_modules; list what to adapt
modules_to_save                   PEFT           !only a classifier head is trained besides the adapters
lora_modules_to_save              axolotl        !only a classifier head is trained besides the adapters
lora_parameters.keys              mlx-lm         adapter.target_modules
lora_parameters.rank              mlx-lm         rank.budget
lora_parameters.alpha             mlx-lm         adapter.alpha
lora_parameters.scale             mlx-lm         adapter.alpha; the scale is alpha / r
lora_parameters.dropout           mlx-lm         adapter.dropout
trainable_token_indices           PEFT           adapter.new_tokens; texts, not numbers; one that is there already too
add_tokens                        LLaMA-Factory  adapter.new_tokens
add_special_tokens                LLaMA-Factory  adapter.new_tokens; as `{content: TEXT, special: true}`
new_special_tokens                LLaMA-Factory  adapter.new_tokens; as `{content: TEXT, special: true}`
new_special_tokens_config         LLaMA-Factory  adapter.new_tokens_init; `text`: from the tokens that it had
init_special_tokens               LLaMA-Factory  adapter.new_tokens_init; `text`: from the tokens that it had
tokens                            axolotl        adapter.new_tokens
special_tokens                    axolotl        adapter.new_tokens; as `{content: TEXT, special: true}`
added_tokens_overrides            axolotl        adapter.new_tokens; one that is there already trains as well
resize_vocab                      LLaMA-Factory  -`adapter.new_tokens` get rows where the table has none
resize_token_embeddings_to_32x    axolotl        -`adapter.new_tokens` get rows where the table has none, and no more
mean_resizing                     transformers   adapter.new_tokens_init; `mean` is the mean itself, without noise
init_lora_weights                 PEFT           adapter.init_weights
peft_init_lora_weights            axolotl        adapter.init_weights
lora_bias                         PEFT           !an adapter has no bias
bias                              PEFT           !biases stay frozen
r                                 PEFT           rank.budget
lora_r                            axolotl        rank.budget
lora_rank                         LLaMA-Factory  rank.budget
adapter.rank                      own            rank.budget
adapter.r                         PEFT           rank.budget
rank_budget                       own            rank.budget
target_r                          PEFT           rank.budget
adalora_target_r                  ms-swift       rank.budget
init_r                            PEFT           rank.init
r_init                            own            rank.init
adalora_init_r                    ms-swift       rank.init
r_max                             own            rank.init
rank_pattern                      PEFT           !the ranks per layer are a result, written to adapter_config.json
alpha_pattern                     PEFT           !a result, written to adapter_config.json
lora_rank_pattern                 axolotl        !the ranks per layer are a result, written to adapter_config.json
lora_alpha_pattern                axolotl        !a result, written to adapter_config.json
total_step                        PEFT           -the schedule is given in shares of the run, see `pruning.start`
tinit                             PEFT           pruning.start; a share of all steps, not a number
adalora_tinit                     ms-swift       pruning.start; a share of all steps, not a number
tfinal                            PEFT           pruning.end; a share of all steps: when the budget is met
adalora_tfinal                    ms-swift       pruning.end; a share of all steps: when the budget is met
deltaT                            PEFT           pruning.events; the number of events, not the steps between them
adalora_deltaT                    ms-swift       pruning.events; the number of events, not the steps between them
beta1                             PEFT           -it is 0.85 in `pruning.policy: sensitivity`
beta2                             PEFT           -it is 0.85 in `pruning.policy: sensitivity`
orth_reg_weight                   PEFT           adapter.penalty; with `variant: adalora`
prune                             own            pruning
pruning_policy                    own            pruning.policy
num_epochs                        axolotl        train.epochs
num_train_epochs                  transformers   train.epochs
max_epochs                        litgpt         train.epochs
iters                             mlx-lm         train.max_steps
max_steps_per_epoch               torchtune      train.max_steps; of the whole run
per_device_train_batch_size       transformers   train.micro_batch_size
batch_size                        torchtune      train.micro_batch_size
train_batch_size                  transformers   train.micro_batch_size
per_device_eval_batch_size        transformers   train.micro_batch_size; evaluation uses it too
eval_batch_size                   axolotl        train.micro_batch_size; evaluation uses it too
gradient_accumulation             own            train.gradient_accumulation_steps
grad_accumulation_steps           mlx-lm         train.gradient_accumulation_steps
global_batch_size                 litgpt         train.gradient_accumulation_steps; with `train.micro_batch_size`
lr                                PyTorch        train.learning_rate
optimizer.lr                      torchtune      train.learning_rate
optimizer.init_args.lr            litgpt         train.learning_rate
optimizer.weight_decay            torchtune      train.weight_decay
optimizer._component_             torchtune      train.optimizer
optim                             transformers   train.optimizer
lr_scheduler_type                 transformers   train.lr_scheduler
lr_schedule                       mlx-lm         train.lr_scheduler
lr_scheduler._component_          torchtune      train.lr_scheduler
lr_scheduler.num_warmup_steps     torchtune      train.warmup_steps
lr_warmup_steps                   litgpt         train.warmup_steps
warmup                            mlx-lm         train.warmup_steps
clip_grad_norm                    torchtune      train.max_grad_norm
max_norm                          litgpt         train.max_grad_norm
gradient_clipping                 DeepSpeed      train.max_grad_norm
use_gradient_checkpointing        Unsloth        train.gradient_checkpointing
grad_checkpoint                   mlx-lm         train.gradient_checkpointing
enable_activation_checkpointing   torchtune      train.gradient_checkpointing
activation_offloading             TRL            train.gradient_checkpointing: offload
enable_activation_offloading      torchtune      train.gradient_checkpointing: offload
disable_gradient_checkpointing    LLaMA-Factory  train.gradient_checkpointing: false
torch_compile                     transformers   train.compile
logging_steps                     transformers   train.log_steps
log_every_n_steps                 torchtune      train.log_steps
log_interval                      litgpt         train.log_steps
steps_per_report                  mlx-lm         train.log_steps
save_every_n_steps                torchtune      train.save_steps
save_interval                     litgpt         train.save_steps
save_every                        mlx-lm         train.save_steps
saves_per_epoch                   axolotl        train.save_steps
save_strategy                     transformers   train.save_steps
save_total_limit                  transformers   -a run keeps what `last` and `best` need
logger_name                       litgpt         train.report_to
wandb_project                     axolotl        train.report_to: [wandb]; the project's name comes from WANDB_PROJECT
use_tensorboard                   axolotl        train.report_to: [tensorboard]
use_mlflow                        axolotl        train.report_to: [mlflow]
metric_logger                     torchtune      train.report_to
eval_steps                        transformers   eval.steps
evals_per_epoch                   axolotl        eval.steps
eval_strategy                     transformers   eval.steps
evaluation_strategy               transformers   eval.steps
steps_per_eval                    mlx-lm         eval.steps
run_val_every_n_steps             torchtune      eval.steps
eval.interval                     litgpt         eval.steps
max_eval_samples                  transformers   eval.max_samples
val_batches                       mlx-lm         eval.max_samples; a number of examples
eval.max_iters                    litgpt         eval.max_samples; a number of examples
early_stopping_steps              LLaMA-Factory  eval.early_stopping_patience
metric_for_best_model             transformers   -the best state is the one with the lowest held-out loss
load_best_model_at_end            transformers   -with `eval.early_stopping_patience` the best state is what is saved
out_dir                           litgpt         output_dir
adapter_path                      mlx-lm         output_dir
resume_adapter_file               mlx-lm         adapter.from
lora_model_dir                    axolotl        adapter.from
adapter_name_or_path              LLaMA-Factory  adapter.from
overwrite_output_dir              transformers   -give `--overwrite` on the command line
resume_from_checkpoint            transformers   -give `--resume` on the command line
auto_resume_from_checkpoints      axolotl        -give `--resume` on the command line
random_state                      Unsloth        seed
random_seed                       own            seed
data_seed                         transformers   seed
deepspeed                         transformers   -not supported: only the adapters have gradients and optimizer state
fsdp                              transformers   train.shard_base: true; with `--devices N` on the command line
do_train                          transformers   -`dynlora train` trains
do_eval                           transformers   -evaluation is on where there are held-out rows
stage                             LLaMA-Factory  train.objective; sft, dpo, orpo or kto
rlhf_type                         ms-swift       train.objective; sft, dpo, orpo or kto
rl                                axolotl        train.objective; sft, dpo, orpo or kto
rl_beta                           axolotl        train.beta
dpo_beta                          axolotl        train.beta
pref_beta                         LLaMA-Factory  train.beta
orpo_alpha                        axolotl        train.beta; with `train.objective: orpo`
pref_loss                         LLaMA-Factory  train.loss_type; of orpo: `train.objective: orpo`
dpo_loss_type                     axolotl        train.loss_type
pref_ftx                          LLaMA-Factory  train.sft_weight
rpo_alpha                         ms-swift       train.sft_weight
dpo_label_smoothing               axolotl        train.label_smoothing
kto_chosen_weight                 LLaMA-Factory  train.desirable_weight
kto_rejected_weight               LLaMA-Factory  train.undesirable_weight
kto_desirable_weight              axolotl        train.desirable_weight
kto_undesirable_weight            axolotl        train.undesirable_weight
ref_model                         LLaMA-Factory  !the model that the run starts from, adapter.from included
precompute_ref_log_probs          TRL            -the reference is always asked once, before the first step
max_prompt_length                 TRL            -prompt and answer together have dataset.max_length tokens
"""


class Alias(NamedTuple):
    """A foreign key: whose it is, our name (empty where there is none), a remark, and whether something is lost."""

    tool: str
    here: str
    remark: str
    lost: bool = False


def read_line(tool: str, answer: str) -> Alias:
    """The answer of a line of the tables."""
    if answer[0] in "-!":
        return Alias(tool, "", answer[1:], answer[0] == "!")
    here, _, remark = answer.partition("; ")
    return Alias(tool, here, remark)


def _read_keys() -> dict[str, Alias]:
    lines = (line.split(None, 2) for line in [*_KEYS.strip().splitlines(), *ARGUMENTS.strip().splitlines()])
    return {name: read_line(tool, answer) for name, tool, answer in lines}


KEYS = _read_keys()


@cache
def keys_of(importer: str) -> dict[str, Alias]:
    """The keys that the importer of a tool adds to these."""
    tool = plugins.declared("importers", importer, "NAME")
    lines = (line.split(None, 1) for line in plugins.declared("importers", importer, "KEYS").strip().splitlines())
    return {name: read_line(tool, answer) for name, answer in lines}


def hint(path: Sequence[str | int]) -> str | None:
    """What a key known from elsewhere is called here; the whole path is looked up first, then its last word."""
    names = _names(path)
    found = next(((name, KEYS[name]) for name in names if name in KEYS), None)
    return _sentence(*found) if found else None


def tool_hint(path: Sequence[str | int]) -> str | None:
    """The same for a key that one tool alone has, by the table of its importer."""
    for name in _names(path):
        for importer in plugins.names("importers"):
            if name in (keys := keys_of(importer)):
                return _sentence(name, keys[name])
    return None


def _names(path: Sequence[str | int]) -> tuple[str, str]:
    words = [step for step in path if isinstance(step, str)]
    return ".".join(words), words[-1]


def _sentence(name: str, alias: Alias) -> str:
    remark = f" ({alias.remark})" if alias.remark else ""
    if alias.tool == "own":
        return f"`{name}` is `{alias.here}` here{remark}"
    origin = f"`{name}` is {alias.tool}'{'' if alias.tool.endswith('s') else 's'} name"
    if not alias.here:
        return f"{origin}; it has no counterpart here: {alias.remark}"
    return f"{origin}; here it is `{alias.here}`{remark}"


def value_hint(key: str, value: object) -> str | None:
    """What a value known from elsewhere is called here, for the setting `key`."""
    here = VALUES.get((key, str(value).lower()))
    if here is None:
        return None
    return f"write {here}" if "`" in here else f"write `{key}: {here}`"
