# The model of train_shakespeare_char_cpu.py, to the same loss in about a tenth of the time.
# For a better one in about the time that takes, as in the README:
#   --batch_size=24 --max_iters=1300 --lr_decay_iters=1300 --cooldown_iters=910 --muon_lr=0.02

out_dir = 'out-shakespeare-char-cpu-fast'
eval_interval = 250             # here: only after the last iteration
eval_iters = 20
log_interval = 20
always_save_checkpoint = False  # only the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-cpu-fast'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
rotary = True
rmsnorm = True
qk_norm = True
untied = True

muon_lr = 0.035                 # of the blocks' matrices
learning_rate = 6e-3            # of the two tables
beta1 = 0.7                     # few iterations: a short memory
max_iters = 240
lr_decay_iters = 240            # = max_iters
cooldown_iters = 160            # the last two thirds
min_lr = 3e-4
warmup_iters = 0                # updates of Muon are of one size from the first

device = 'cpu'
compile = False                 # takes longer than the whole run
