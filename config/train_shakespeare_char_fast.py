# A model of the size of train_shakespeare_char.py, with RoPE, RMSNorm, Muon, ... as in
# config/readme.md. Its loss over the whole validation split passes nanoGPT's 1.4697 after 9.2M
# tokens, and ends at 1.4365. For one GPU; 2 CPU cores take three quarters of an hour.

out_dir = 'out-shakespeare-char-fast'
eval_interval = 125
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # ckpt.pt only when val loss improves

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-fast'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 32                 # 8,192 tokens per iteration, 12 epochs in all
block_size = 256
without_replacement = True      # every epoch reads nearly all of the text

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.25                  # 0.3 learns more slowly, and overfitting is still small
rotary = True
rmsnorm = True
qk_norm = True
untied = True

muon_lr = 0.02                  # peak learning rate of the matrices in the blocks
learning_rate = 4e-3            # peak learning rate of the token embedding and lm_head
beta1 = 0.8                     # few iterations: average gradients over fewer of them
max_iters = 1500
lr_decay_iters = 1500           # equal to max_iters
cooldown_iters = 1500           # linear, from the first iteration
min_lr = 0.0
warmup_iters = 0                # Muon's update norm does not depend on the gradients' norm
