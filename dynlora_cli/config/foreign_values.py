"""Values of settings that are known from other tools, and what they are called here.

A line of the table holds our setting, the foreign value, and ours; an answer with quoted keys is part of a sentence.
"""

from __future__ import annotations

_VALUES = """
task            CAUSAL_LM               causal-lm
task            SEQ_CLS                 sequence-classification
task            SEQ_2_SEQ_LM            seq2seq-lm
task            classification          sequence-classification
dtype           fp32                    float32
dtype           bf16                    bfloat16
dtype           fp16                    float16
dtype           half                    float16
dtype           float                   float32
dtype           bf16-true               bfloat16
dtype           bf16-mixed              bfloat16
dtype           16-true                 float16
dtype           torch.float32           float32
dtype           torch.bfloat16          bfloat16
dtype           torch.float16           float16
attn_implementation  fa2                flash_attention_2
attn_implementation  flash_attn         flash_attention_2
attn_implementation  flash_attention    flash_attention_2
attn_implementation  flash              flash_attention_2
attn_implementation  auto               null
variant         qlora                   `variant: lora` with `model.load_in_4bit: true`
variant         rslora                  `variant: lora` with `scaling: rslora` and `alpha: 16`
variant         pissa                   `variant: lora` with `init_weights: pissa`
variant         loftq                   `variant: lora` with `init_weights: loftq` and `model.load_in_4bit: true`
variant         eva                     `variant: lora` with `init_weights: eva`
variant         none                    full
variant         freeze                  full
target_modules  all                     all-linear
target_modules  all_linear              all-linear
target_modules  linear                  all-linear
target_modules  auto                    all-linear
scaling         standard                lora
init_weights    true                    default
init_weights    kaiming                 default
format          sharegpt                chat
format          messages                chat
format          conversational          chat
format          chat_template           chat
format          chatml                  chat
format          openai                  chat
format          instruct                alpaca
format          prompt-completion       completion
format          prompt_completion       completion
format          input_output            completion
format          pretrain                text
format          dpo                     preference
format          rlhf                    preference
format          ranking                 preference
format          chatml.intel            preference
format          unpaired_preference     kto
objective       pt                      sft
objective       instruct                sft
objective       preference              dpo
objective       ipo                     `objective: dpo` with `loss_type: ipo`
objective       simpo                   `objective: orpo`, which needs no reference either
objective       bco                     `objective: dpo` with `loss_type: bco_pair`
train_on        completions             completion
train_on        assistants              assistant
train_on        inputs                  all
overlong        raise                   error
overlong        delete                  drop
overlong        left                    truncate
overlong        right                   truncate
policy          adalora                 sensitivity
policy          norm                    magnitude
policy          l2                      magnitude
lr_scheduler    cosine_with_min_lr      cosine
lr_scheduler    cosine_with_restarts    cosine
lr_scheduler    warmup_cosine           cosine
lr_scheduler    cosine_decay            cosine
lr_scheduler    polynomial              linear
lr_scheduler    constant_with_warmup    `lr_scheduler: constant` with `warmup_ratio`
lr_scheduler    none                    constant
optimizer       adam                    adamw
optimizer       adamw_torch             adamw
optimizer       adamw_torch_fused       adamw
optimizer       adamw_hf                adamw
optimizer       adamw_bnb_8bit          adamw_8bit
optimizer       adamw8bit               adamw_8bit
optimizer       paged_adamw_32bit       paged_adamw
report_to       none                    []
report_to       all                     a list of the trackers you use
max_grad_norm   0                       null
"""


def _read_values() -> dict[tuple[str, str], str]:
    lines = (line.split(None, 2) for line in _VALUES.strip().splitlines())
    return {(key, value.lower()): here for key, value, here in lines}


VALUES = _read_values()
