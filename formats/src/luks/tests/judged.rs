//! Against the reference tools and cryptsetup, both ways: their images are read and written here,
//! and they read what was written.

use gipfel_testkit::{DiskModel, Rng, Scratch, tools};

use super::image::{Memory, Recipe, open_with, options};
use super::{read, run, write};

const PASSPHRASE: &str = "correct horse";
const SIZE: u64 = 256 << 10;

/// Says that the image `path`, opened by the reference, shows what the raw image `raw` does.
fn compare(path: &str, raw: &str) {
    let secret = format!("secret,id=s,data={PASSPHRASE}");
    let image = format!("driver=luks,key-secret=s,file.filename={path}");
    let raw = format!("driver=raw,file.filename={raw}");
    tools::qemu_img(&["compare", "--object", &secret, "--image-opts", &image, &raw]);
}

/// Reads the image `path`, in which `model` was written by others, writes at random places, and
/// lets the reference read that.
fn exchange(scratch: &Scratch, path: &str, model: &mut DiskModel, rng: &mut Rng) {
    let memory = Memory::new(std::fs::read(path).unwrap(), 0);
    run(async {
        let disk = open_with(&memory, None, PASSPHRASE, options()).await.unwrap();
        assert_eq!(disk.size().await.unwrap(), model.size(), "{path}");
        model.expect(0, &read(&disk, 0, model.size() as usize).await);
        for _ in 0..20 {
            let at = rng.below(model.size());
            let len = rng.between(1, (model.size() - at).min(30_000));
            let data = rng.bytes(len as usize);
            write(&disk, at, &data).await;
            model.write(at, &data);
        }
    });
    std::fs::write(path, &*memory.bytes()).unwrap();
    let raw = scratch.arg("model.raw");
    model.save(&raw);
    compare(path, &raw);
}

/// Fills the image `path` by the reference, and exchanges data with it.
fn exchange_filled(scratch: &Scratch, path: &str, rng: &mut Rng) {
    let secret = format!("secret,id=s,data={PASSPHRASE}");
    let (raw, mut model) = (scratch.arg("first.raw"), DiskModel::new(SIZE));
    model.randomize(rng, 100);
    model.save(&raw);
    let image = format!("driver=luks,key-secret=s,file.filename={path}");
    let args = ["convert", "-n", "--object", &secret, "--target-image-opts", &raw, &image];
    tools::qemu_img(&args);
    exchange(scratch, path, &mut model, rng);
}

#[test]
fn an_image_of_the_reference_goes_both_ways() {
    if !tools::have("qemu-img") {
        return;
    }
    // One only: making them takes it seconds of measuring the machine, whatever is asked for.
    let (scratch, mut rng) = (Scratch::new("luks-reference"), Rng::from_env());
    let secret = format!("secret,id=s,data={PASSPHRASE}");
    let (path, size) = (scratch.arg("image.luks"), SIZE.to_string());
    let how = "key-secret=s,iter-time=10";
    let args = ["create", "-q", "-f", "luks", "--object", &secret, "-o", how, &path, &size];
    tools::qemu_img(&args);
    exchange_filled(&scratch, &path, &mut rng);
}

#[test]
fn the_reference_agrees_on_every_kind() {
    if !tools::have("qemu-img") {
        return;
    }
    let (scratch, mut rng) = (Scratch::new("luks-kinds"), Rng::from_env());
    for (cipher, mode, key_len, hash) in [
        ("aes", "xts-plain64", 64, "sha256"),
        ("aes", "xts-plain64:sha256", 32, "sha512"),
        ("aes", "xts-plain", 32, "sha384"),
        ("aes", "xts-essiv:sha256", 48, "sha1"),
        ("aes", "cbc-essiv:sha256", 16, "sha1"),
        ("aes", "cbc-essiv:sha256", 32, "sha224"),
        ("aes", "cbc-plain64", 16, "ripemd160"),
        ("aes", "cbc-plain", 32, "sha256"),
        ("aes", "ecb-plain64", 16, "sha256"),
        ("serpent", "xts-plain64", 64, "sha256"),
        ("serpent", "cbc-essiv:sha256", 16, "sha1"),
        ("twofish", "xts-plain64", 64, "sha1"),
        ("twofish", "xts-plain64", 48, "sha1"),
        ("twofish", "cbc-essiv:sha256", 16, "sha1"),
    ] {
        let slots = vec![(2, "another"), (5, PASSPHRASE)];
        let recipe = Recipe { cipher, mode, key_len, hash, slots, size: SIZE as usize };
        let path = scratch.file("image.luks", &recipe.image(false));
        exchange_filled(&scratch, &path, &mut rng);
    }
}

#[test]
fn images_of_cryptsetup_go_both_ways() {
    if !tools::have("cryptsetup") || !tools::have("qemu-img") {
        return;
    }
    let (scratch, mut rng) = (Scratch::new("luks-cryptsetup"), Rng::from_env());
    let key = scratch.file("key", PASSPHRASE.as_bytes());
    for (cipher, bits, hash) in [
        ("aes-xts-plain64", "512", "sha256"),
        ("aes-cbc-essiv:sha256", "256", "sha1"),
        ("aes-cbc-plain", "128", "sha512"),
        ("aes-cbc-plain64", "192", "sha1"),
        ("aes-xts-plain", "256", "ripemd160"),
    ] {
        let path = scratch.file("image.luks", &vec![0; 3 << 20]);
        let mut args = vec!["luksFormat", "-q", "--type", "luks1", "--disable-locks"];
        args.extend(["--pbkdf-force-iterations", "1000", "-c", cipher, "-s", bits, "-h", hash]);
        args.extend([&*path, &*key]);
        tools::run("cryptsetup", &args);
        // What stands there before anybody writes is what zeros decrypt to.
        let memory = Memory::new(std::fs::read(&path).unwrap(), 0);
        let mut model = run(async {
            let disk = open_with(&memory, None, PASSPHRASE, options()).await.unwrap();
            let size = disk.size().await.unwrap();
            DiskModel::of(&read(&disk, 0, size as usize).await)
        });
        if bits != "192" {
            // The reference aborts over key material that does not fill its last sector.
            exchange(&scratch, &path, &mut model, &mut rng);
        }
        tools::run("cryptsetup", &["isLuks", "--type", "luks1", &path]);
        tools::run("cryptsetup", &["open", "--test-passphrase", "-d", &key, &path]);
    }
}
