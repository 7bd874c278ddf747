"""
What a run records: log.csv in its out_dir, and Weights & Biases.

Not here: the lines that it prints (train.py, summary.py).
"""
import csv
import math
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from components.distributed import is_first_process, print_master
from components.errors import UserError
from components.files import lock_directory, whole_file
from components.tokenizer import get_tokenizer

COLUMNS = ('iter', 'tokens', 'seconds', 'loss', 'train_loss', 'val_loss', 'lr', 'grad_norm',
           'tokens_per_second', 'mfu')


class Log:
    """
    Writes log.csv, and with wandb_log sends evaluations and samples to Weights & Biases.

    log.csv has a row for each iteration that was logged or evaluated: the tokens and seconds of
    training before it, over all resumes; the loss of its batch (the last row has no batch and
    repeats the loss before); its evaluations, in nats per token; learning rate; norm of the
    gradients; tokens per second; MFU from 0 to 1, or -1 where it is not known yet. A new run
    replaces the file. A resumed run removes the rows from its first iteration on, and appends.

    Args:
        config: dict of settings
        progress: the Progress of the run, as this process begins
        tokenizer: spec of the dataset's tokenizer, or None
        is_resumed: whether log.csv is of this run
    """

    def __init__(self, config, progress, tokenizer, is_resumed):
        self.eval_split = config['eval_split']
        self.row = {}
        self.path = None
        self.wandb = None
        self.tokenizer = None
        if not is_first_process():
            return
        if not config['eval_only']:
            self.path = Path(config['out_dir'], 'log.csv')
            self.open_csv(progress.iter_num, is_resumed)
        if config['wandb_log']:
            self.open_wandb(config, progress.run_id, tokenizer)

    def open_csv(self, first_iter, is_resumed):
        """ Creates log.csv, of a resumed run with the rows before `first_iter`. """
        self.path.parent.mkdir(parents=True, exist_ok=True)  # now, and not after hours
        lock_directory(self.path.parent)
        rows = []
        if is_resumed and self.path.exists():
            rows = self.read_rows(first_iter)
        with (whole_file(self.path) as temporary,
              open(temporary, 'w', encoding='utf-8', newline='') as file):
            writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore', lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)

    def read_rows(self, first_iter):
        """ The complete rows of log.csv before `first_iter`. """
        rows = []
        try:
            with open(self.path, encoding='utf-8', newline='') as file:
                for row in csv.DictReader(file):
                    is_complete = None not in row and None not in row.values()
                    if is_complete and int(row['iter']) < first_iter:
                        rows.append(row)
        except (csv.Error, KeyError, ValueError) as error:
            raise UserError(f'{self.path} is damaged ({error}); remove it') from None
        return rows

    def open_wandb(self, config, run_id, tokenizer):
        import wandb
        run_id = os.environ.get('WANDB_RUN_ID', run_id)  # of a run that another script began
        try:
            self.wandb = wandb.init(
                project=config['wandb_project'], name=config['wandb_run_name'] or None,
                config=config, resume='allow', id=run_id)
        except wandb.errors.Error as error:
            raise UserError(f'wandb: {error}; run `wandb login` once, or put WANDB_MODE=offline '
                            'before the command, which records the run here') from None
        self.wandb.define_metric('*', step_metric='iter')
        if tokenizer is None or config['fsdp']:  # this process cannot sample without the others
            return
        try:
            self.tokenizer = get_tokenizer(tokenizer)
        except OSError as error:
            print_master(f'wandb receives no samples, which need a tokenizer: {error}')

    def add(self, **columns):
        """ Adds columns to the row of this iteration. None leaves a column empty. """
        self.row.update(columns)

    def end_row(self, progress):
        """ Appends the row of this iteration to log.csv, if it has any columns. """
        if self.row and self.path is not None:
            row = {'iter': progress.iter_num, 'tokens': progress.tokens,
                   'seconds': progress.seconds, **self.row}
            for name, value in row.items():
                if isinstance(value, float):
                    row[name] = f'{value:.6g}'
            self.append(row)
        self.row = {}

    def append(self, row):
        """ Appends a row to log.csv. If that fails, no part of the row stays. """
        size = None
        try:
            size = self.path.stat().st_size
            with open(self.path, 'a', encoding='utf-8', newline='') as file:
                csv.DictWriter(file, COLUMNS, lineterminator='\n').writerow(row)
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)
            print_master(f'WARNING: log.csv lacks iteration {row["iter"]}: {error}')

    def add_evaluation(self, iter_num, losses, lr, mfu, model, ids):
        """
        Adds an evaluation, and sends it to Weights & Biases, with three samples of the model.

        Args:
            losses: {split: mean loss}
            lr, mfu: learning rate; running MFU
            model: the GPT
            ids: token ids of the validation split, whose beginning the samples continue
        """
        val_loss = losses[self.eval_split]
        self.add(train_loss=losses['train'], val_loss=val_loss, lr=lr)
        if self.wandb is None:
            return
        values = {f'{split}/loss': loss for split, loss in losses.items()}
        is_finite = all(math.isfinite(loss) for loss in losses.values())
        if self.tokenizer is not None and is_finite:
            import wandb
            rows = [[iter_num, text] for text in self.sample(model, ids)]
            values['samples'] = wandb.Table(['iter', 'text'], rows)
        self.wandb.log({'iter': iter_num, 'lr': lr, 'mfu': mfu * 100, **values})

    def sample(self, model, ids):
        """ Three continuations of the first 16 of `ids`, with the same random numbers. """
        from components.generation import complete
        max_new_tokens = 100
        random_numbers = np.random.default_rng(0).random((3, max_new_tokens), np.float32)
        prompt = ids[:16].tolist()
        model.eval()
        # compiled blocks are for training, and would be compiled again for other numbers of tokens
        with torch.compiler.set_stance('force_eager'):
            completions, _ = complete(model, self.tokenizer, [prompt] * 3,
                                      torch.from_numpy(random_numbers),
                                      vocab_size=self.tokenizer.vocab_size)
        model.train()
        return [completion.text for completion in completions]
