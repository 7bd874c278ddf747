# Evaluates gpt2-large on OpenWebText (774M parameters: 36 layers, 20 heads, 1280 channels).
# Published train / val loss: 2.66 / 2.67, with the exact GELU. Here GPT-2 keeps its own tanh GELU.
#   python train.py config/eval_gpt2_large.py

init_from = 'gpt2-large'
eval_only = True
eval_iters = 500  # batches per split, for a precise estimate
batch_size = 8
wandb_log = False
