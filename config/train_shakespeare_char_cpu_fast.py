# A model of the size of train_shakespeare_char_cpu.py, with RoPE, RMSNorm, Muon, ... as in
# config/readme.md. It reaches the same loss in less than a twelfth of that config's time in
# float32. For a much lower loss in about that time, add
#   --block_size=256 --batch_size=6 --rope_base=800 --muon_lr=0.02 --min_lr=0
#   --max_iters=1500 --lr_decay_iters=1500 --cooldown_iters=1500

out_dir = 'out-shakespeare-char-cpu-fast'
eval_interval = 250             # above max_iters: only at iteration 0 and after the last
eval_iters = 20
log_interval = 20
always_save_checkpoint = False  # ckpt.pt only when val loss improves

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-cpu-fast'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 2
n_embd = 128
rotary = True
rope_base = 200                 # the default base suits contexts far longer than block_size
rmsnorm = True
qk_norm = True
untied = True

muon_lr = 0.035                 # peak learning rate of the matrices in the blocks
learning_rate = 6e-3            # peak learning rate of the token embedding and lm_head
beta1 = 0.7                     # few iterations: average gradients over fewer of them
max_iters = 215
lr_decay_iters = 215            # equal to max_iters
cooldown_iters = 143            # linear, over the last two thirds
min_lr = 3e-4
warmup_iters = 0                # Muon's update norm does not depend on the gradients' norm

device = 'cpu'
compile = False                 # compiling takes longer than the whole run
