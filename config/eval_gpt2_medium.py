# The loss of gpt2-medium on OpenWebText (24 layers, 16 heads, 1024 wide: 350M).
# Published with the exact GELU: 2.85 / 2.84 (train / val). This evaluates with GPT-2's own tanh form.
#   python train.py config/eval_gpt2_medium.py

init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500  # for a close estimate
batch_size = 8
wandb_log = False
