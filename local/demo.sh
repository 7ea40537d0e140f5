#!/usr/bin/env bash
# Run the whole recipe offline on a CPU, in minutes: from audio files to a table of WERs.
#
#   bash local/demo.sh                        with a corpus synthesized by espeak-ng
#   bash local/demo.sh --corpus my/table.tsv  with yours: utt_id, text, path[, speaker, split]
#
# Finished stages are skipped. --stage N repeats stage N and later ones, --stop-stage N stops after N:
#   1 corpus  2 features  3 tiny LLM  4 two encoders  5 train  6 train_mose  7 decode both
# --encoder-epochs N and --llm-epochs N set the epochs of stage 4, and of stages 5 and 6.
# Writes to data/demo and exp/demo, or with --corpus a/b.tsv to data/a-b and exp/a-b.
set -eou pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

table="" name=demo stage=8 stop_stage=8 encoder_epochs=6 llm_epochs=""
refuse() { echo "$*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  [ "$1" != --help ] || { sed -n '2,10s/^# \{0,1\}//p' local/demo.sh; exit 0; }
  [ $# -ge 2 ] || refuse "$1 needs a value"
  case "$1" in
    --corpus)
      table=$(cd "$caller" && realpath -m -- "$2")
      [ -f "$table" ] || refuse "--corpus $2: no such file"
      name=$(basename "$(dirname "$table")")-$(basename "${table%.*}")
      name=${name//[^[:alnum:]-]/-} ;;
    --stage | --stop-stage | --encoder-epochs | --llm-epochs)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || refuse "$1 $2 must be a whole number of at least 1"
      flag=${1#--}
      declare "${flag//-/_}=$2" ;;
    *) refuse "unknown option $1 (see local/demo.sh --help)" ;;
  esac
  shift 2
done

start=$SECONDS
source local/venv.sh requirements.txt
python=.venv/bin/python data=data/$name exp=exp/$name
mkdir -p "$data/fbank" "$exp/log"

# A changed table is a new corpus: start from stage 1.
if [ -n "$table" ] && ! cksum <"$table" | cmp -s - "$exp/.table"; then
  stage=1
  cksum <"$table" >"$exp/.table"
fi

log() { echo "$(date '+%H:%M:%S') (${name}, $((SECONDS - start)) s) $*"; }

# due N TITLE: check that stage N has to run; `finished N` marks it.
due() {
  [ "$1" -lt "$stage" ] || rm -f "$exp/.stage$1.done"
  [ "$1" -le "$stop_stage" ] && [ ! -f "$exp/.stage$1.done" ] && log "Stage $1: $2"
}
finished() { touch "$exp/.stage$1.done"; }

# fresh N DIR…: remove the results of a repeated stage; an interrupted one resumes.
fresh() { [ "$1" -lt "$stage" ] || rm -rf "${@:2}"; }

# quietly LOG COMMAND…: write the output to a file, and print its end on failure.
quietly() {
  local file=$exp/log/$1
  shift
  "$@" >"$file" 2>&1 || { tail -n 20 "$file" >&2; echo "failed; see $file" >&2; exit 1; }
}

# Models this small gain little from a second thread or rank, so each process uses one core, except
# in stage 6, which runs alone. The second encoder is trained in the background, at low priority,
# until then.
# Each background job has its own process group (set -m), which is killed with this script.
set -m
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null; done' EXIT
export OMP_NUM_THREADS=1
# Human speech varies more than espeak-ng's voices: the encoders need SpecAugment in the second half
# of their training. An LLM with a larger vocabulary needs more steps. LoRA would learn the texts of
# a small corpus by heart: there, the LLM repeats as it was trained to.
if [ -z "$table" ]; then
  llm_epochs=${llm_epochs:-4} llm_steps=900
  speed_perturb=false dropout=0 mose_duration=12
  lora=(--lora-r 16 --lora-alpha 32)
  unmasked_epochs=$encoder_epochs
else
  llm_epochs=${llm_epochs:-6} llm_steps=2000
  speed_perturb=true dropout=0.1 mose_duration=6
  lora=(--lora-lr 0.01)
  unmasked_epochs=$(((encoder_epochs + 1) / 2))
fi
corpus=(--manifest-dir "$data/fbank" --min-duration 0.3 --enable-musan false --num-workers 0)
cuts=(--train-cuts "${name}_cuts_train" --valid-cuts "${name}_cuts_dev")
# Digits and spelled letters are short: 12.5 speech embeddings per second instead of 6.25.
model=(--llm-path "$exp/llm" --speech-encoder-type tiny --encoder-projector-ds-rate 2)
one=(--speech-encoder-path "$exp/encoder1/pretrained.pt"
  --speech-encoder-bpe-path "$exp/encoder1/bpe.model")
two=(--speech-encoder-path "$exp/encoder1/pretrained.pt,$exp/encoder2/pretrained.pt"
  --speech-encoder-bpe-path "$exp/encoder1/bpe.model,$exp/encoder2/bpe.model")

batches=(--use-fp16 false --num-buckets 8 --enable-spec-aug false --log-interval 20)
encoder=(--encoder-size tiny --world-size 1 --max-duration 15
  --avg $(((encoder_epochs + 1) / 2)) --lr-epochs 3 --warmup-batches 100 --dropout $dropout
  --encoder-feature-mask false)
llm=(--world-size 1 --max-duration 12 --optimizer adamw --max-grad-norm 1 --lora-dropout 0
  "${lora[@]}" --projector-dropout 0.5 --projector-lr 3
  --lr-schedule cosine --warmup-batches 50 --token-ctc-weight 1 --encoder-feature-mask false
  --encoder-cache-dir "$exp/encoder_outputs" --num-epochs $llm_epochs)
avg=1 # the learning rate ends at 0, so averaging earlier epochs does not help
decoding=(--epoch $llm_epochs --avg $avg --max-duration 120 --max-new-tokens 100
  --manifest-dir "$data/fbank" --num-workers 0)

# train_encoder N: train encoder N, an initial part of the epochs without SpecAugment.
train_encoder() {
  local run=("$python" src/pretrain_encoder.py "${corpus[@]}" "${cuts[@]}" "${batches[@]}"
    "${encoder[@]}" --test-cuts "${name}_cuts_test" --vocab-size $((300 - 100 * $1)) --seed "$1"
    --exp-dir "$exp/encoder$1")
  quietly "encoder$1.log" "${run[@]}" --num-epochs "$unmasked_epochs"
  [ "$unmasked_epochs" -eq "$encoder_epochs" ] || quietly "encoder$1-masked.log" "${run[@]}" \
    --num-epochs "$encoder_epochs" --enable-spec-aug true
}

# decode_twice EXP PROGRAM FLAGS…: decode greedily, and with beam search rescored by CTC.
decode_twice() {
  local run=("$python" "src/$2.py" "${decoding[@]}" "${@:3}" --exp-dir "$exp/$1")
  local test=(--test-cuts "${name}_cuts_test") weight
  quietly "$2.log" "${run[@]}" "${test[@]}" --method draft
  quietly "$2-dev.log" "${run[@]}" --test-cuts "${name}_cuts_dev" --beam-size 4 --nbest 4
  weight=$(ctc_weight "$1")
  quietly "$2-ctc.log" "${run[@]}" "${test[@]}" --beam-size 4 --ctc-weight "$weight"
}
suffix=epoch-$llm_epochs-avg-$avg-max100
# ctc_weight EXP: print the best weight on the dev set; 0 for an untrained encoder's CTC head.
ctc_weight() {
  local best
  best=$(sed -n 's/^best --ctc-weight: \([0-9.]*\) .*/\1/p' \
    "$exp/$1/decode/wer-summary-${name//-/_}_dev-decode-beam4-nbest4-$suffix.txt")
  echo "${best:-0}"
}

if due 1 "corpus"; then
  if [ -z "$table" ]; then
    fresh 1 "$data/corpus"
    [ -d "$data/corpus" ] ||
      quietly corpus.log $python local/make_spoken_corpus.py --out "$data/corpus"
  fi
  finished 1
fi
table=${table:-$data/corpus/transcripts.tsv}

if due 2 "features of $table"; then
  quietly features.log $python local/prepare_corpus.py --table "$table" --corpus "$name" \
    --manifest-dir "$data/fbank" --speed-perturb $speed_perturb --num-jobs 1 --overwrite true
  finished 2
fi

if due 3 "a tiny LLM for the transcripts"; then
  rm -rf "$exp/llm"
  quietly llm.log $python local/make_tiny_llm.py --out "$exp/llm" \
    --text "$data/fbank/${name}_cuts_train.jsonl.gz" --max-steps $llm_steps &
  llm_job=$!
fi

if due 4 "two tiny encoders with CTC, the second in the background"; then
  fresh 4 "$exp"/encoder[12]
  train_encoder 2 &
  encoder2_job=$!
  renice -n 10 -g "$encoder2_job" >/dev/null
  train_encoder 1 &
  wait $!
fi
if [ -n "${llm_job:-}" ]; then
  wait "$llm_job"
  finished 3
fi

training=("${corpus[@]}" "${cuts[@]}" "${batches[@]}" "${llm[@]}" "${model[@]}")
if due 5 "train.py on the first encoder"; then
  fresh 5 "$exp/llm_asr" "$exp/encoder_outputs"
  quietly train.log $python src/train.py "${training[@]}" "${one[@]}" --exp-dir "$exp/llm_asr" \
    --base-lr 0.001
  finished 5
fi
if [ -n "${encoder2_job:-}" ]; then
  wait "$encoder2_job"
  finished 4
fi

if due 6 "train_mose.py on both encoders, from the model of stage 5"; then
  fresh 6 "$exp/mose"
  # A high learning rate would destroy what the first run has learned.
  quietly train_mose.log $python src/train_mose.py "${training[@]}" "${two[@]}" \
    --exp-dir "$exp/mose" --base-lr 0.0005 \
    --world-size 2 --max-duration $mose_duration \
    --pretrained-model-path "$exp/llm_asr/epoch-$llm_epochs.pt"
  finished 6
fi

if due 7 "decode.py and decode_mose.py, side by side"; then
  decode_twice llm_asr decode "${model[@]}" "${one[@]}" &
  job=$!
  decode_twice mose decode_mose "${model[@]}" "${two[@]}" &
  wait $job
  wait $!
  [ ! -f "$data/corpus/words.jsonl" ] || quietly word_times.log $python local/score_word_times.py \
    "$exp/llm_asr/decode/ctm-${name//-/_}_test-decode-draft-$suffix.ctm" "$data/corpus/words.jsonl"
  finished 7
fi

# wer EXP SUFFIX: print the WER in the first line of the test set's error file, `%WER = 3.14`.
wer() { sed -n '1s/.*= //p' "$exp/$1/decode/errs-${name//-/_}_test-$2.txt"; }

[ "$stop_stage" -ge 7 ] || { log "Stopped after stage $stop_stage"; exit 0; }
ctc=$(wer encoder1 ctc-greedy)
of_llm=$(ctc_weight llm_asr) of_mose=$(ctc_weight mose)
recordings=("$data"/corpus/wav/*/*-test-00000.flac)
[ -f "${recordings[0]}" ] || recordings=(FILE)
beam() { [ "$1" = 0 ] && echo beam4 || echo "beam4-ctc$1"; }
llm_wer=$(wer llm_asr "decode-$(beam "$of_llm")-$suffix")
mose_wer=$(wer mose "decode-$(beam "$of_mose")-$suffix")
cat <<TXT

  WER of ${name}_test                      %      where to look
  CTC alone                        $(printf %8s "$ctc")      $exp/encoder1/decode
  LLM, greedy                      $(printf %8s "$(wer llm_asr "decode-draft-$suffix")")      $exp/llm_asr/decode
  LLM, beam with CTC weight $(printf %-6s "$of_llm") $(printf %8s "$llm_wer")
  MoSE of 2 encoders, greedy       $(printf %8s "$(wer mose "decode-draft-$suffix")")      $exp/mose/decode
  MoSE, beam with CTC weight $(printf %-5s "$of_mose") $(printf %8s "$mose_wer")

  The CTC weights are the best ones on ${name}_dev.
$(sed -n '2,5s/^/  /p' "$exp/log/word_times.log" 2>/dev/null || true)
  report-*.html shows every error. To plot the training, transcribe a recording, and serve the model
  at http://127.0.0.1:8000:

    $python src/plot_training.py $exp/llm_asr --out training.html
    $python src/transcribe.py --exp-dir $exp/llm_asr --epoch $llm_epochs --avg $avg ${recordings[0]}
    $python src/serve.py --exp-dir $exp/llm_asr --epoch $llm_epochs --avg $avg

TXT
log "done"
echo "demo result: ctc=$ctc% llm=$llm_wer% mose=$mose_wer%"
