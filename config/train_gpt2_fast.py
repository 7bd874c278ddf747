# GPT-2's size (124M; 162M with untied embeddings) on OpenWebText, with RoPE, RMSNorm, Muon, ... as
# in config/readme.md, in a quarter of the iterations of train_gpt2.py. It is not tuned for this
# size; only its first tokens were compared with train_gpt2.py.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py

out_dir = 'out-gpt2-fast'

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-fast'

# 12 sequences of 1024 tokens x 40 micro-batches = 491,520 tokens per iteration, whatever the number
# of GPUs. An 80 GB GPU takes more at a time, also each of 8: --batch_size=60
# --gradient_accumulation_steps=8 are as many tokens. 40 GB: 30 and 16; a T4 (16 GB): 12 and 40
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

rotary = True
rmsnorm = True
qk_norm = True
untied = True

muon_lr = 0.02                  # peak learning rate of the matrices in the blocks
learning_rate = 3e-3            # peak learning rate of the token embedding and lm_head
min_lr = 0.0
warmup_iters = 250
max_iters = 150000              # 74 billion tokens
lr_decay_iters = 150000         # equal to max_iters
cooldown_iters = 75000          # linear, over the second half

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
