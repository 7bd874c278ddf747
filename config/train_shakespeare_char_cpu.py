# A small character-level model of Shakespeare for a CPU, with nanoGPT's settings: a minute or two
# on 2 cores. train_shakespeare_char_cpu_fast.py reaches the same loss much sooner.

out_dir = 'out-shakespeare-char-cpu'
eval_interval = 250
eval_iters = 20
log_interval = 50
always_save_checkpoint = False  # ckpt.pt only when val loss improves

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-cpu'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 1e-3            # peak; small models allow a higher one
max_iters = 2000
lr_decay_iters = 2000           # equal to max_iters
min_lr = 1e-4                   # learning_rate / 10
beta2 = 0.99                    # few tokens per iteration: average squared gradients longer
warmup_iters = 100

device = 'cpu'
compile = False                 # compiling takes longer than the whole run
