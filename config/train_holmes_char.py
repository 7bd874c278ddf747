# A small model of the characters of The Adventures of Sherlock Holmes: minutes on one GPU. Prepare first:
#   python data/holmes/prepare.py
# On a CPU, in seconds: config/train_shakespeare_char_cpu_fast.py --dataset=holmes --out_dir=out-holmes

out_dir = 'out-holmes-char'
eval_interval = 250             # often, because a model of this size soon overfits one book
log_interval = 10
always_save_checkpoint = False  # only the best

wandb_project = 'holmes-char'

dataset = 'holmes'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.3                   # half as much text as Shakespeare's

learning_rate = 1e-3            # small models bear more
max_iters = 3000
lr_decay_iters = 3000           # = max_iters
min_lr = 1e-4                   # = learning_rate / 10
beta2 = 0.99                    # few tokens an iteration make noisy gradients: average over more of them
warmup_iters = 100
