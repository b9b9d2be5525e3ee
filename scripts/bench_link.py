"""A simulated network: two network namespaces, joined by a process that carries their packets and takes its time.

Each namespace has a TUN device with an MTU of 1500, shaped by tbf to the rate. Packets come out of it as a network card gets them that does
segmentation itself: up to 64 KiB at once. They are held for half of the round trip time each way, and of the segments that they stand for
some are lost, by a generator with a fixed seed; the others are passed on in as few packets as before. The namespaces and their devices are
gone when that process ends, which it does when its standard input ends.
"""
import array, collections, ctypes, fcntl, json, math, os, random, re, select, shutil, signal, struct, subprocess, sys, time

NEAR, FAR = "10.77.0.1", "10.77.0.2"
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
FORM = re.compile(r"(?P<rate>[\d.]+(?:[kmg]bit))(?:,(?P<delay>[\d.]+)ms)?(?:,(?P<loss>[\d.]+)%)?")


class Link:
    """The simulated network that `text` describes: RATE[,DELAY[,LOSS]]. This process's namespace is its near end."""

    address, near, device = FAR, NEAR, "wire"

    def __init__(self, text, congestion):
        form = FORM.fullmatch(text)
        if not form:
            sys.exit(f"--link {text}: give RATE[,DELAY[,LOSS]], as in 1gbit or 100mbit,20ms or 1gbit,20ms,0.1%")
        self.rate, self.delay, self.loss = form["rate"], float(form["delay"] or 0), float(form["loss"] or 0)
        for program in ("ip", "tc", "nsenter"):
            if not shutil.which(program):
                sys.exit(f"--link needs {program}: install iproute2 and util-linux")
        command = [sys.executable, os.path.abspath(__file__), self.rate, str(self.delay), str(self.loss), congestion]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.ended = os.pidfd_open(self.process.pid)
        if self.process.stdout.readline() != b"ready\n":
            sys.exit("the simulated network could not be set up")

    def __str__(self):
        lost = f", {self.loss:g} % of segments lost" if self.loss else ""
        return f"simulated network: {self.rate}/s each way, round trip {self.delay:g} ms{lost}, MTU 1500"

    def wire_bytes(self):
        """What has been sent from both ends, with the headers of each segment, before anything was lost."""
        count = ["tc", "-s", "-j", "qdisc", "show", "dev", self.device]
        return sum(json.loads(subprocess.check_output(command))[0]["bytes"] for command in (count, self.far(count)))

    def far(self, command):
        """`command`, to be run at the far end."""
        return ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", *command]

    def check(self):
        """Ends the program if packets were given up because they were not carried away in time: then the figures are worth nothing."""
        if any(counters(self.device, process)[11] for process in ("self", self.process.pid)):
            sys.exit("the simulated network was too slow for what was sent: it dropped packets")

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


class Loopback:
    """The network where nothing is simulated. Its counters are of this program's connections alone where it has a namespace of its own."""

    address, delay, ended = "127.0.0.1", 0, None

    def __init__(self, congestion):
        if congestion:
            congestion_control(congestion, "local 127.0.0.1 dev lo table local proto kernel scope host src 127.0.0.1")

    def __str__(self):
        return "loopback"

    def wire_bytes(self):
        return counters("lo")[8]

    def far(self, command):
        return command

    def check(self):
        pass

    def stop(self):
        pass


def counters(device, process="self"):
    """What /proc/net/dev says of a device in the namespace of a process: the ninth are bytes sent, the twelfth packets that could not be."""
    with open(f"/proc/{process}/net/dev") as table:
        for line in table:
            name, _, numbers = line.partition(":")
            if name.strip() == device:
                return [int(number) for number in numbers.split()]
    sys.exit(f"/proc/net/dev: there is no {device}")


def congestion_control(name, route):
    """Has TCP use `name` on a route, of which a namespace may choose what the machine does not let it have as its default."""
    with open("/proc/sys/net/ipv4/tcp_available_congestion_control") as names:
        available = names.read().split()
    if name not in available:
        sys.exit(f"congestion control {name}: there is {', '.join(available)}")
    subprocess.run(["ip", "route", "change", *route.split(), "congctl", name], check=True)


# linux/if_tun.h
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
# What stands before each packet, of linux/virtio_net.h: flags, kind of segmentation, length of headers, of a segment, place of the checksum.
VIRTIO = struct.Struct("=BBHHHH")
CLONE_NEWNET = 0x40000000
LARGEST = VIRTIO.size + 65535


def open_end(address, rate, congestion):
    """A TUN device in this namespace, up and shaped: its descriptor."""
    try:
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        sys.exit(f"--link needs TUN devices: /dev/net/tun: {error.strerror}")
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", Link.device.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(end, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    bits = float(rate[:-4]) * UNITS[rate[-4:]]
    # What may go at once: a millisecond's worth, one packet of 64 KiB in fast networks. tbf itself cuts what is larger.
    burst = int(min(max(bits / 8 / 1000, 16_000), 1_000_000))
    for command in (["ip", "link", "set", "lo", "up"],
                    ["ip", "link", "set", Link.device, "up", "mtu", "1500", "txqueuelen", "10000"],
                    ["ip", "address", "add", f"{address}/30", "dev", Link.device],
                    ["tc", "qdisc", "add", "dev", Link.device, "root", "tbf", "rate", rate, "burst", str(burst), "latency", "100ms"]):
        subprocess.run(command, check=True)
    if congestion:
        congestion_control(congestion, f"10.77.0.0/30 dev {Link.device} proto kernel scope link src {address}")
    return end


def headers(packet):
    """Where TCP's header begins in a packet of IPv4, and where it ends."""
    tcp = VIRTIO.size + (packet[VIRTIO.size] & 15) * 4
    return tcp, tcp + (packet[tcp + 12] >> 4) * 4


def segments(packet):
    """How many segments a packet stands for."""
    if packet[1] == 0:
        return 1
    return -(-(len(packet) - headers(packet)[1]) // VIRTIO.unpack_from(packet)[3])


def checksum(data):
    """The sum of the internet's protocols, not yet inverted."""
    words = array.array("H", data)
    words.byteswap()
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def part(packet, first, end):
    """A packet of the segments from `first` until before `end` of one that stands for several."""
    ip = VIRTIO.size
    tcp, content = headers(packet)
    flags, kind, _, size, start, offset = VIRTIO.unpack_from(packet)
    kept = packet[content + first * size : content + end * size]
    out = bytearray(packet[:content])
    if len(kept) <= size:
        kind = size = 0
    VIRTIO.pack_into(out, 0, flags, kind, content - ip, size, start, offset)
    struct.pack_into(">H", out, ip + 2, content - ip + len(kept))
    struct.pack_into(">H", out, ip + 10, 0)
    struct.pack_into(">H", out, ip + 10, checksum(out[ip:tcp]) ^ 0xFFFF)
    sequence = struct.unpack_from(">I", out, tcp + 4)[0] + first * VIRTIO.unpack_from(packet)[3]
    struct.pack_into(">I", out, tcp + 4, sequence & 0xFFFFFFFF)
    if content + len(kept) + first * VIRTIO.unpack_from(packet)[3] < len(packet):
        out[tcp + 13] &= ~0x09  # FIN and PSH are of the last
    if first:
        out[tcp + 13] &= ~0x80  # CWR is of the first
    # The kernel sums up the content itself; here the sum is that of the addresses, the protocol and the length.
    pseudo = out[ip + 12 : ip + 20] + struct.pack(">HH", 6, content - tcp + len(kept))
    struct.pack_into(">H", out, tcp + 16, checksum(pseudo))
    return bytes(out + kept)


class Loss:
    """Says of one segment after the other whether it arrives."""

    def __init__(self, percent, seed):
        self.chance, self.random = percent / 100, random.Random(seed)
        self.arriving = self.run()

    def run(self):
        """How many arrive before the next that is lost."""
        return int(math.log(1 - self.random.random()) / math.log(1 - self.chance)) if self.chance else math.inf

    def what_arrives(self, packet):
        """The packets that are left of one."""
        count = segments(packet)
        if self.arriving >= count:
            self.arriving -= count
            return [packet]
        left, first = [], 0
        while first + self.arriving < count:
            lost = first + self.arriving
            if lost > first:
                left.append(part(packet, first, lost))
            first, self.arriving = lost + 1, self.run()
        if first < count:
            left.append(part(packet, first, count))
        self.arriving -= count - first
        return left


class Way:
    """One direction: packets are read from one device and written to the other when their time has come."""

    def __init__(self, source, target, seconds, loss):
        self.source, self.target, self.seconds, self.loss = source, target, seconds, loss
        self.waiting = collections.deque()

    def take(self):
        due = time.monotonic() + self.seconds
        try:
            for _ in range(32):
                packet = os.read(self.source, LARGEST)
                for left in self.loss.what_arrives(packet):
                    self.waiting.append((due, left))
        except BlockingIOError:
            pass

    def give(self):
        """Writes what is due; gives the seconds until there is more to do."""
        while self.waiting:
            wait = self.waiting[0][0] - time.monotonic()
            if wait > 0:
                return wait
            os.write(self.target, self.waiting.popleft()[1])
        return math.inf


def carry(ways):
    """Carries packets until standard input ends."""
    while True:
        wait = min(way.give() for way in ways)
        readable, _, _ = select.select([0, *(way.source for way in ways)], [], [], None if wait == math.inf else wait)
        if 0 in readable:
            return
        for way in ways:
            if way.source in readable:
                way.take()


def main(rate, delay, loss, congestion):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    near = open_end(NEAR, rate, congestion)
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        sys.exit(f"--link needs a network namespace: {os.strerror(ctypes.get_errno())}")
    far = open_end(FAR, rate, congestion)
    # A network does not wait for a processor that its ends are using.
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    seconds = float(delay) / 2000
    print("ready", flush=True)
    carry([Way(near, far, seconds, Loss(float(loss), 3)), Way(far, near, seconds, Loss(float(loss), 4))])


if __name__ == "__main__":
    main(*sys.argv[1:])
