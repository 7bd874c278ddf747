# A small model of Shakespeare's characters: minutes on one GPU. On a CPU: train_shakespeare_char_cpu.py.

out_dir = 'out-shakespeare-char'
eval_interval = 250             # often, because a model of this size soon overfits this text
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # only the best

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

learning_rate = 1e-3            # small models bear more
max_iters = 5000
lr_decay_iters = 5000           # = max_iters
min_lr = 1e-4                   # = learning_rate / 10
beta2 = 0.99                    # few tokens an iteration make noisy gradients: average over more of them
warmup_iters = 100
