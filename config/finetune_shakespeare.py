# Fine-tunes GPT-2 XL on Shakespeare, minutes on one GPU. Prepare the dataset first:
#   python data/shakespeare/prepare.py
# For a smaller GPU or a laptop, add --init_from=gpt2
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False               # --wandb_log=True turns it on
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False  # ckpt.pt only when val loss improves

# 1 sequence of 1024 tokens x 32 micro-batches = 32,768 tokens per iteration; train.bin has 301,966
# tokens, so an epoch is about 9 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# constant and low, because the weights are already trained
learning_rate = 3e-5
decay_lr = False
