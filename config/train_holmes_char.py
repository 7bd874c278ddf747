# A small character-level model of The Adventures of Sherlock Holmes: minutes on one GPU. Prepare
# the dataset first:
#   python data/holmes/prepare.py
# On a CPU, a smaller model in seconds:
#   python train.py config/train_shakespeare_char_cpu_fast.py --dataset=holmes --out_dir=out-holmes

out_dir = 'out-holmes-char'
eval_interval = 250             # often, because this model soon overfits one book
log_interval = 10
always_save_checkpoint = False  # ckpt.pt only when val loss improves

wandb_project = 'holmes-char'

dataset = 'holmes'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.3                   # more than for Shakespeare, which is twice as much text

learning_rate = 1e-3            # peak; small models allow a higher one
max_iters = 3000
lr_decay_iters = 3000           # equal to max_iters
min_lr = 1e-4                   # learning_rate / 10
beta2 = 0.99                    # few tokens per iteration: average squared gradients longer
warmup_iters = 100
