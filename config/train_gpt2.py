# GPT-2 (124M) on OpenWebText: about 4 days on 8 A100 40GB, published val loss about 2.85.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 sequences of 1024 tokens x 40 micro-batches = 491,520 tokens per iteration, whatever the number
# of GPUs. An 80 GB GPU takes more at a time, also each of 8: --batch_size=60
# --gradient_accumulation_steps=8 are as many tokens. 40 GB: 30 and 16; a T4 (16 GB): 12 and 40
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens in total
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
