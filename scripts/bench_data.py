"""What is pushed: the rows of scripts/bench. Each is made anew, of the size that --scale or ROW:SCALE says."""
import array, contextlib, os, random, shutil, time

ROWS = {
    "random": "1 GiB of noise in one file",
    "bf16": "1 GiB of normally distributed model weights in one file",
    "text": "512 MiB of text in 8 shards",
    "medium": "256 MiB of text in 16 shards",
    "small": "20,000 files of 1 to 32 KB of noise",
    "tiny": "5,000 files of 4 to 60 KiB of noise",
    "nothing": "100,000 files of 1 KB, all there already",
    "one": "100,000 files of 1 KB, one of which has changed",
    "changed": "1 GiB of noise of which 1 % has changed, in pieces of 64 KiB",
    "inserted": "1 GiB of noise with 1 MiB more at its front",
    "copied": "1 GiB of noise, and the same beside it under another name",
    "renamed": "1 GiB of noise, in a directory that has another name now",
    "grown": "1 GiB of noise with 16 MiB more at its end",
    "appended": "1 GiB of noise that 16 MiB were appended to, for lockstep with --append-only",
}
# Of these the target has an older version, and of those everything but one file at most.
CHANGES = ("changed", "inserted", "copied", "renamed", "grown", "appended")
# Of these there is one version alone, which is changed where it lies.
IN_PLACE = ("renamed", "appended")

KEPT = ("nothing", "one")
# How many files at scale 1, and of how many bytes.
FILES = {"small": (20000, 1000, 32000), "tiny": (5000, 4 << 10, 60 << 10), "nothing": (100000, 1000, 1000), "one": (100000, 1000, 1000)}
SHARDS = {"text": (8, 64 << 20), "medium": (16, 16 << 20)}


def bf16(count):
    """Normally distributed bf16 weights, little endian: `count` bytes in pieces of 16 MiB."""
    generator = random.Random(7)
    floats = array.array("f", (generator.gauss(0, 0.02) for _ in range(8 << 20)))
    raw = floats.tobytes()
    pool = bytearray(len(raw) // 2)
    pool[0::2], pool[1::2] = raw[2::4], raw[3::4]
    for start in range(0, count, len(pool)):
        turn = 2 * generator.randrange(len(pool) // 2)
        yield (pool[turn:] + pool[:turn])[:count - start]


def settle():
    """What a file system says of a file that was written this moment is believed by nobody, and some look at whole seconds alone."""
    time.sleep(1.1)


def noise(at, mebibytes):
    with open(at, "wb") as out:
        for _ in range(mebibytes):
            out.write(os.urandom(1 << 20))


def make(row, at, scale):
    """The data of a row that the target has nothing of, or all of it."""
    os.makedirs(at)
    generator = random.Random(11)
    size = int((1 << 30) * scale)
    if row == "random":
        noise(f"{at}/model.bin", max(1, size >> 20))
    elif row == "bf16":
        with open(f"{at}/model.safetensors", "wb") as out:
            out.writelines(bf16(size))
    elif row in SHARDS:
        count, length = SHARDS[row]
        words = [bytes(generator.choices(b"abcdefghijklmnopqrstuvwxyz", k=generator.randrange(2, 11))) for _ in range(20000)]
        for shard in range(count):
            with open(f"{at}/shard-{shard}.jsonl", "wb") as out:
                while out.tell() < length * scale:
                    line = b" ".join(generator.choices(words, k=60))
                    out.write(b'{"id": %d, "text": "%s"}\n' % (generator.randrange(1 << 30), line))
    else:
        count, least, most = FILES[row]
        for number in range(int(count * scale)):
            directory = f"{at}/part-{number // 500:04}"
            if number % 500 == 0:
                os.makedirs(directory)
            with open(f"{directory}/{number:06}.bin", "wb") as out:
                out.write(os.urandom(generator.randint(least, most)))
    settle()


def change_one(at):
    """Gives one of the files of a row other content."""
    with open(f"{at}/part-0000/000042.bin", "wb") as out:
        out.write(os.urandom(1000))
    settle()


def make_change(row, old, new, scale):
    """A file of noise, and what became of it."""
    for at in (old, new) if row not in IN_PLACE else (new,):
        os.makedirs(f"{at}/checkpoint-1")
    size = int((1 << 30) * scale) >> 20 << 20
    noise(f"{new if row in IN_PLACE else old}/checkpoint-1/model.bin", size >> 20)
    settle()
    if row in IN_PLACE:
        return
    with open(f"{new}/checkpoint-1/model.bin", "wb") as out:
        if row == "inserted":
            out.write(os.urandom(1 << 20))
        with open(f"{old}/checkpoint-1/model.bin", "rb") as before:
            shutil.copyfileobj(before, out, 1 << 20)
        if row == "grown":
            out.write(os.urandom(16 << 20))
        if row == "changed":
            generator = random.Random(5)
            for _ in range(size // 100 >> 16):
                out.seek(generator.randrange(size >> 16) << 16)
                out.write(os.urandom(1 << 16))
    if row == "copied":
        shutil.copystat(f"{old}/checkpoint-1/model.bin", f"{new}/checkpoint-1/model.bin")
        os.makedirs(f"{new}/checkpoint-2")
        shutil.copyfile(f"{old}/checkpoint-1/model.bin", f"{new}/checkpoint-2/model.bin")
    settle()


@contextlib.contextmanager
def changed_in_place(row, at):
    """Changes what lies there; afterwards it is as it was."""
    first, second, size = f"{at}/checkpoint-1", f"{at}/checkpoint-2", 0
    if row == "renamed":
        os.rename(first, second)
    else:
        size = os.path.getsize(f"{first}/model.bin")
        with open(f"{first}/model.bin", "ab") as out:
            out.write(os.urandom(16 << 20))
        settle()
    try:
        yield second if row == "renamed" else first
    finally:
        if row == "renamed":
            os.rename(second, first)
        else:
            os.truncate(f"{first}/model.bin", size)
            settle()
