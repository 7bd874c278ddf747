# A model of the size of train_shakespeare_char.py, with the recipe of
# train_shakespeare_char_cpu_fast.py, for one GPU. It is not tuned for this size.

out_dir = 'out-shakespeare-char-fast'
eval_interval = 100             # often, because this model soon overfits this text
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # ckpt.pt only when val loss improves

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

muon_lr = 0.02                  # peak learning rate of the matrices in the blocks
learning_rate = 4e-3            # peak learning rate of the token embedding and lm_head
beta1 = 0.8                     # few iterations: average gradients over fewer of them
max_iters = 1000
lr_decay_iters = 1000           # equal to max_iters
cooldown_iters = 700            # linear, over the last 70%
min_lr = 2e-4
warmup_iters = 0                # Muon's update norm does not depend on the gradients' norm
