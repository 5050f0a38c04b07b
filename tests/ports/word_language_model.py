"""The shape of the word language model of pytorch/examples: an LSTM whose state goes on from window to window, tied weights."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# fxstn: import fxstn
from tests.ports.data import text


class RNNModel(nn.Module):
    """An encoder, an LSTM and a decoder; the decoder shares the encoder's weight on demand."""

    def __init__(self, ntoken, ninp, nhid, nlayers, dropout=0.5, tie_weights=False):
        super().__init__()
        self.ntoken = ntoken
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout)
        self.decoder = nn.Linear(nhid, ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        self.nhid, self.nlayers = nhid, nlayers

    def forward(self, input: Tensor, hidden: tuple[Tensor, Tensor]):
        emb = self.drop(self.encoder(input))
        output, hidden = self.rnn(emb, hidden)
        output = self.drop(output)
        decoded = self.decoder(output)
        decoded = decoded.view(-1, self.ntoken)
        return nn.functional.log_softmax(decoded, dim=1), hidden

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        return weight.new_zeros(self.nlayers, bsz, self.nhid), weight.new_zeros(self.nlayers, bsz, self.nhid)


def batchify(data, bsz):
    nbatch = data.size(0) // bsz
    return data.narrow(0, 0, nbatch * bsz).view(bsz, -1).t().contiguous()


def repackage_hidden(h):
    """The state without its past."""
    if isinstance(h, Tensor):
        return h.detach()
    return tuple(repackage_hidden(v) for v in h)


def main(argv: Sequence[str] = ()) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument("--emsize", type=int, default=16)
    parser.add_argument("--nhid", type=int, default=16)
    parser.add_argument("--nlayers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=10.0)
    parser.add_argument("--clip", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=10)
    parser.add_argument("--bptt", type=int, default=10)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--save", default="")
    args = parser.parse_args(argv)

    torch.manual_seed(1111)
    ntokens = 12
    train_data, val_data = batchify(text(2000, 0), args.batch_size), batchify(text(500, 1), args.batch_size)
    model = RNNModel(ntokens, args.emsize, args.nhid, args.nlayers, args.dropout, args.tied)
    criterion = nn.NLLLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)

    def get_batch(source, i):
        seq_len = min(args.bptt, len(source) - 1 - i)
        return source[i : i + seq_len], source[i + 1 : i + 1 + seq_len].view(-1)

    # fxstn: valid = [(i, model.init_hidden(10), t) for i, t in (get_batch(val_data, i) for i in range(0, 49, args.bptt))]
    # fxstn: tuner = fxstn.tune(model, optimizer, lambda o, t: criterion(o[0], t), None, valid, epoch_steps=20)

    def evaluate(data_source):
        model.eval()
        total_loss = 0.0
        hidden = model.init_hidden(args.batch_size)
        with torch.no_grad():
            for i in range(0, data_source.size(0) - 1, args.bptt):
                data, targets = get_batch(data_source, i)
                output, hidden = model(data, hidden)
                hidden = repackage_hidden(hidden)
                total_loss += len(data) * criterion(output, targets).item()
        return total_loss / (len(data_source) - 1)

    log, evaluations, best_val_loss = [], [], None
    for epoch in range(1, args.epochs + 1):
        model.train()
        hidden = model.init_hidden(args.batch_size)
        for i in range(0, train_data.size(0) - 1, args.bptt):
            inputs, targets = get_batch(train_data, i)
            optimizer.zero_grad()
            hidden = repackage_hidden(hidden)
            # fxstn: batch = inputs, hidden, targets
            output, hidden = model(inputs, hidden)
            loss = criterion(output, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            # fxstn: tuner.step(batch)
            log.append({"epoch": epoch, "loss": loss.item()})
        val_loss = evaluate(val_data)
        evaluations.append(val_loss)
        if best_val_loss is None or val_loss < best_val_loss:
            if args.save:
                torch.save(model.state_dict(), args.save)
            best_val_loss = val_loss
        else:
            optimizer.param_groups[0]["lr"] /= 4.0
    return {"model": model, "optimizer": optimizer, "log": log, "evaluations": [math.exp(v) for v in evaluations]}


if __name__ == "__main__":
    main()
