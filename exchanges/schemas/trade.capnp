# One public trade, version 1. Numbers are scaled integers, never floats: prices in millionths of a dollar, counts in
# hundredths of a contract. Times are nanoseconds since 1970-01-01T00:00:00Z.
#
# Only append fields; what readers know by number must not change. A changed file needs its new SHA-256 in trade.yaml.
@0xc7a1f05d93be4862;

struct Trade {
  tradeId @0 :Text;
  # The exchange's own id (a UUID in Kalshi's case). Unique; trades of several connections are united by it.

  ticker @1 :Text;
  # Market ticker as the exchange writes it, not encoded.

  yesPrice @2 :Int64;
  # Price of a YES contract in 1e-6 dollars: 560000 is $0.5600.

  noPrice @3 :Int64;
  # Price of a NO contract in 1e-6 dollars.

  count @4 :Int64;
  # Contracts traded, in 1e-2 contracts: 100 is one contract.

  takerSide @5 :Side;
  # The outcome that the taker bought.

  eventNs @6 :Int64;
  # Time of the trade as the exchange gives it. It decides which trading day the trade belongs to.

  recvNs @7 :Int64;
  # When the recorder received it.

  isBlockTrade @8 :Bool;
  # Negotiated off the book; false where the exchange did not say.

  source @9 :Source;
  # Where this row comes from.

  conn @10 :Text;
  # Connection that received it: epoch-shard-number.

  n @11 :UInt64;
  # Ordinal of the raw record on that connection, so that a row can be traced to its bytes.

  enum Side {
    unknown @0;
    yes @1;
    no @2;
  }

  enum Source {
    unknown @0;
    live @1;     # the WebSocket, as it happened
    rest @2;     # the exchange's REST list
    archive @3;  # a replayed archive
  }
}
