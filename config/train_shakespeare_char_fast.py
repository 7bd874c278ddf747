# The model of train_shakespeare_char.py, with the recipe of train_shakespeare_char_cpu_fast.py, for one GPU.
# Carried over from the small size; it has not been run on a GPU, and nothing is claimed for it.

out_dir = 'out-shakespeare-char-fast'
eval_interval = 100             # often, because a model of this size soon overfits this text
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # only the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-fast'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
rotary = True
rmsnorm = True
qk_norm = True
untied = True

muon_lr = 0.02                  # of the blocks' matrices
learning_rate = 4e-3            # of the two tables
beta1 = 0.8                     # few iterations: a short memory
max_iters = 1000
lr_decay_iters = 1000           # = max_iters
cooldown_iters = 700            # the last seven tenths
min_lr = 2e-4
warmup_iters = 0                # updates of Muon are of one size from the first
