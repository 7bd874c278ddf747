# A small text in GPT-2's tokens: the validation file of WikiText-2 for training, its test file for
# validation, which is not the benchmark. RoPE, RMSNorm, Muon, ... as in config/readme.md. 13.7M
# parameters, of which the two embeddings have 12.9M; a few minutes on a CPU. At equal FLOPs, the
# settings of train_wikitext2.py have a validation loss that is higher by 0.33 nats per token (mean
# of 3 seeds); see "Text in GPT-2 tokens" in config/readme.md. Prepare the dataset first, from a
# folder with the two files, named train.txt and valid.txt:
#   python data/custom/prepare.py --source=wikitext-2 --name=wikitext2_small
# For your own text, add --dataset=mine --out_dir=out-mine. Measured is one epoch of 260,000 tokens,
# the config as it is. For a longer text, raise max_iters and lr_decay_iters to its tokens / 2,048
# and cooldown_iters to 70% of that, and widen the model; for the whole of WikiText-2, 2.4M tokens:
#   --dataset=wikitext2 --max_iters=1200 --lr_decay_iters=1200 --cooldown_iters=840

out_dir = 'out-wikitext2-fast'
eval_interval = 64              # often: if max_iters grows, this text is soon overfitted
eval_iters = 10
log_interval = 10
always_save_checkpoint = False  # ckpt.pt only when val loss improves

wandb_project = 'wikitext2'
wandb_run_name = 'wikitext2-fast'

dataset = 'wikitext2_small'
gradient_accumulation_steps = 1
batch_size = 16                 # at equal tokens, 8 sequences have a higher loss
block_size = 128                # 2,048 tokens per iteration
without_replacement = True      # random windows miss a third of an epoch's text

n_layer = 4
n_head = 2
n_embd = 128                    # lm_head needs 88% of the FLOPs
dropout = 0.0                   # in one epoch, 0.1 has a higher loss
rotary = True
rmsnorm = True
qk_norm = True
untied = True                   # lower loss at the same FLOPs; the embeddings need twice the memory

muon_lr = 0.02                  # peak learning rate of the matrices in the blocks
learning_rate = 4e-3            # peak learning rate of the token embedding and lm_head
beta1 = 0.8                     # few iterations: average gradients over fewer of them
max_iters = 128                 # one epoch: as many tokens as the text has
lr_decay_iters = 128            # equal to max_iters
cooldown_iters = 90             # linear, over the last 70%
min_lr = 2e-4
warmup_iters = 0                # Muon's update norm does not depend on the gradients' norm
