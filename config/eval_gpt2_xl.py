# Evaluates gpt2-xl on OpenWebText (1558M parameters: 48 layers, 25 heads, 1600 channels).
# Published train / val loss: 2.56 / 2.54, with the exact GELU. Here GPT-2 keeps its own tanh GELU.
#   python train.py config/eval_gpt2_xl.py

init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500  # batches per split, for a precise estimate
batch_size = 8
wandb_log = False
