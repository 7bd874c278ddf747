# The loss of gpt2-xl on OpenWebText (48 layers, 25 heads, 1600 wide: 1558M).
# Published with the exact GELU: 2.56 / 2.54 (train / val). This evaluates with GPT-2's own tanh form.
#   python train.py config/eval_gpt2_xl.py

init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500  # for a close estimate
batch_size = 8
wandb_log = False
