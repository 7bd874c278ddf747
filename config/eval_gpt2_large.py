# The loss of gpt2-large on OpenWebText (36 layers, 20 heads, 1280 wide: 774M).
# Published with the exact GELU: 2.66 / 2.67 (train / val). This evaluates with GPT-2's own tanh form.
#   python train.py config/eval_gpt2_large.py

init_from = 'gpt2-large'
eval_only = True
eval_iters = 500  # for a close estimate
batch_size = 8
wandb_log = False
