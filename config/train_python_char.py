# A small character-level model of Python's own source, a dataset that needs no network: a minute on
# 2 CPU cores. It also runs on a GPU. RoPE, RMSNorm, Muon, ... as in config/readme.md.
#   python data/python_char/prepare.py
#   python train.py config/train_python_char.py
# For your own text, a token per character:
#   python data/custom/prepare.py --source=my.txt --name=mine --tokenizer=char
#   python train.py config/train_python_char.py --dataset=mine --out_dir=out-mine

out_dir = 'out-python-char'
eval_interval = 250
eval_iters = 20
log_interval = 50
always_save_checkpoint = False  # ckpt.pt only when val loss improves

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

muon_lr = 0.02                  # peak learning rate of the matrices in the blocks
learning_rate = 6e-3            # peak learning rate of the token embedding and lm_head
beta1 = 0.8                     # few iterations: average gradients over fewer of them
max_iters = 1000
lr_decay_iters = 1000           # equal to max_iters
cooldown_iters = 700            # linear, over the last 70%
min_lr = 3e-4
warmup_iters = 0                # Muon's update norm does not depend on the gradients' norm
