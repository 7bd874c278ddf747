# Evaluates gpt2-medium on OpenWebText (350M parameters: 24 layers, 16 heads, 1024 channels).
# Published train / val loss: 2.85 / 2.84, with the exact GELU. Here GPT-2 keeps its own tanh GELU.
#   python train.py config/eval_gpt2_medium.py

init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500  # batches per split, for a precise estimate
batch_size = 8
wandb_log = False
