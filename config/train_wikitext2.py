# A small model of Wikipedia in GPT-2's tokens: minutes on one GPU. Prepare the dataset first:
#   python data/wikitext2/prepare.py
# For a smaller model in some minutes on a CPU, add
#   --eval_iters=20 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128
#   --max_iters=1000 --lr_decay_iters=1000 --eval_interval=250 --dropout=0.0
# For the loss of the whole test split after training, add (with the flags above on a CPU)
#   --init_from=resume --eval_only=True --eval_split=test --eval_iters=-1

out_dir = 'out-wikitext2'
eval_interval = 100             # often, because a model soon overfits so little text
eval_iters = 50
log_interval = 10
always_save_checkpoint = False  # ckpt.pt only when val loss improves

wandb_project = 'wikitext2'

dataset = 'wikitext2'
gradient_accumulation_steps = 1
batch_size = 32
block_size = 256                # 8,192 tokens per iteration; an epoch is about 300 iterations

n_layer = 6
n_head = 6
n_embd = 384                    # two thirds of the parameters are the token embedding
dropout = 0.3

learning_rate = 1e-3            # peak; small models allow a higher one
max_iters = 3000
lr_decay_iters = 3000           # equal to max_iters
min_lr = 1e-4                   # learning_rate / 10
beta2 = 0.99                    # few tokens per iteration: average squared gradients longer
warmup_iters = 100
