# GPT-2 XL, 20 iterations on Shakespeare: minutes on one GPU. Prepare first:
#   python data/shakespeare/prepare.py
# A smaller start for a smaller GPU or a laptop: add --init_from=gpt2
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False               # on with --wandb_log=True
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False  # only the best

# 1 sequence x 32 micro-batches x 1024 tokens are 32,768 tokens an iteration; the text has 301,966,
# so that about 9 iterations are an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# constant, and low: the weights are good already
learning_rate = 3e-5
decay_lr = False
