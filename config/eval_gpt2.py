# Evaluates gpt2 on OpenWebText (124M parameters: 12 layers, 12 heads, 768 channels).
# Published train / val loss: 3.11 / 3.12, with the exact GELU. Here GPT-2 keeps its own tanh GELU.
#   python train.py config/eval_gpt2.py

init_from = 'gpt2'
eval_only = True
eval_iters = 500  # batches per split, for a precise estimate
batch_size = 8
wandb_log = False
