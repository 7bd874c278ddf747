# A small character-level model of Shakespeare: minutes on one GPU. For a CPU, see
# train_shakespeare_char_cpu.py.

out_dir = 'out-shakespeare-char'
eval_interval = 250             # often, because this model soon overfits this text
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # ckpt.pt only when val loss improves

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3            # peak; small models allow a higher one
max_iters = 5000
lr_decay_iters = 5000           # equal to max_iters
min_lr = 1e-4                   # learning_rate / 10
beta2 = 0.99                    # few tokens per iteration: average squared gradients longer
warmup_iters = 100
