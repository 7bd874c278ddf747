# A small model of Python's own source, the dataset that needs no network, with the recipe of
# train_shakespeare_char_cpu_fast.py. A minute on 2 CPU cores; on a GPU the same file, compiled.

out_dir = 'out-python-char'
eval_interval = 250
eval_iters = 20
log_interval = 50
always_save_checkpoint = False  # only the best

wandb_project = 'python-char'

dataset = 'python_char'
gradient_accumulation_steps = 1
batch_size = 24
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
rotary = True
rmsnorm = True
qk_norm = True
untied = True

muon_lr = 0.02                  # of the blocks' matrices
learning_rate = 6e-3            # of the two tables
beta1 = 0.8                     # few iterations: a short memory
max_iters = 1000
lr_decay_iters = 1000           # = max_iters
cooldown_iters = 700            # the last seven tenths
min_lr = 3e-4
warmup_iters = 0                # updates of Muon are of one size from the first
