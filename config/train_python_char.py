# A small model of Python's own source, the dataset that needs no network.
# About a minute and a half on 2 CPU cores; on a GPU the same file, compiled and in 16 bits.

out_dir = 'out-python-char'
eval_interval = 500
eval_iters = 20
log_interval = 50
always_save_checkpoint = False  # only the best

wandb_project = 'python-char'

dataset = 'python_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 4e-3            # small models bear more
max_iters = 2500
lr_decay_iters = 2500           # = max_iters
min_lr = 4e-4                   # = learning_rate / 10
beta2 = 0.99                    # few tokens an iteration make noisy gradients: average over more of them
warmup_iters = 100
