# The loss of gpt2 on OpenWebText (12 layers, 12 heads, 768 wide: 124M).
# Published with the exact GELU: 3.11 / 3.12 (train / val). This evaluates with GPT-2's own tanh form.
#   python train.py config/eval_gpt2.py

init_from = 'gpt2'
eval_only = True
eval_iters = 500  # for a close estimate
batch_size = 8
wandb_log = False
