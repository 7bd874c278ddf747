# A small model of your own text, a token per character: a minute or two on 2 CPU cores. The recipe
# is that of train_python_char.py. It also runs on a GPU.
#   python data/custom/prepare.py --source=my.txt --name=mine --tokenizer=char
#   python train.py config/train_custom.py --dataset=mine --out_dir=out-mine
#   python sample.py --out_dir=out-mine
#
# For text in GPT-2's tokens, prepare it without --tokenizer=char and train with the recipe of
# train_wikitext2_fast.py, about one epoch with sequences of 128 tokens:
#   python data/custom/prepare.py --source=my.txt --name=mine
#   python train.py config/train_wikitext2_fast.py --dataset=mine --out_dir=out-mine
# For more tokens in train.bin (prepare.py prints the number), add the flags of a row, which train
# for one epoch:
#   260,000 tokens (13.7M parameters): the config as it is. Measured, see config/readme.md
#   1 million (21.1M): --n_head=3 --n_embd=192
#       --max_iters=490 --lr_decay_iters=490 --cooldown_iters=340
#   2.5 million (30.5M): --n_layer=6 --n_head=4 --n_embd=256
#       --max_iters=1220 --lr_decay_iters=1220 --cooldown_iters=850
#   10 million (49.3M): --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=32
#       --max_iters=1220 --lr_decay_iters=1220 --cooldown_iters=850
# The other rows are extrapolated, not measured: about ten times the tokens for twice the width.
# For a shorter text, a token per character is the safer choice (not measured either).

out_dir = 'out-custom'
eval_interval = 250
eval_iters = 20
log_interval = 50
always_save_checkpoint = False  # ckpt.pt only when val loss improves

wandb_project = 'custom'

dataset = 'custom'
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
