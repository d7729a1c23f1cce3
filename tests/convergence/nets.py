"""Seven nets as other people write them, each with its training script: a function of a `Run`, that
calls `run.fuse` on its models and logs its losses. Not here: the loop's surroundings (training.py).

A script returns {name: (model, inputs)} for the comparison of outputs in evaluation.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.convergence.training import BATCH, CLASSES


def evaluated(*models):
    """Puts models in evaluation, and returns a context without gradients."""
    for model in models:
        model.eval()
    return torch.no_grad()


def moments_error(fake, real):
    """How far the generated images' mean and deviation of each pixel are from the real ones'."""
    return F.mse_loss(fake.mean(0), real.mean(0)) + F.mse_loss(fake.std(0), real.std(0))


# --- The PyTorch DCGAN example --------------------------------------------------------------------

nz, ngf, ndf, nc = 32, 16, 16, 3


def weights_init(m):
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif classname.find("BatchNorm") != -1:
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(nc, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 4, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, input):
        return self.main(input).view(-1, 1).squeeze(1)


def dcgan(run):
    device = run.device
    netG = Generator().to(device)
    netG.apply(weights_init)
    netD = Discriminator().to(device)
    netD.apply(weights_init)
    run.fuse(netG)
    run.fuse(netD)

    lr = 0.0001  # half the example's, with which rounding grows most of all these nets
    criterion = nn.BCELoss()
    fixed_noise = torch.randn(64, nz, 1, 1, device=device)
    optimizerD = torch.optim.Adam(netD.parameters(), lr=lr, betas=(0.5, 0.999))
    optimizerG = torch.optim.Adam(netG.parameters(), lr=lr, betas=(0.5, 0.999))

    for real, _ in run.batches():
        # (1) D: maximise log(D(x)) + log(1 - D(G(z)))
        netD.zero_grad()
        label = torch.full((BATCH,), 1.0, device=device)
        with run.autocast():
            output = netD(real)
        errD_real = criterion(output.float(), label)
        run.backward(errD_real)

        noise = torch.randn(BATCH, nz, 1, 1, device=device)
        with run.autocast():
            fake = netG(noise)
            output = netD(fake.detach())
        errD_fake = criterion(output.float(), label.fill_(0.0))
        run.backward(errD_fake)
        run.step(optimizerD)

        # (2) G: maximise log(D(G(z)))
        netG.zero_grad()
        with run.autocast():
            output = netD(fake)
        errG = criterion(output.float(), label.fill_(1.0))
        run.backward(errG)
        run.step(optimizerG)
        run.log(D=errD_real + errD_fake, G=errG)

    real, _ = run.held_out()
    with evaluated(netG, netD):
        fake = netG(fixed_noise)
        errD_real = criterion(netD(real), torch.ones(len(real), device=device))
        run.log(eval_images=moments_error(fake, real), eval_D=errD_real)
    return {"netG": (netG, (fixed_noise,)), "netD": (netD, (real,))}


# --- pix2pix: U-Net and PatchGAN ------------------------------------------------------------------


class UnetBlock(nn.Module):
    """One level: down, the levels below it, up, beside its input (not at the outermost)."""

    def __init__(self, outer, inner, submodule=None, outermost=False, dropout=False):
        super().__init__()
        self.outermost = outermost
        channels = 3 if outermost else outer
        downconv = nn.Conv2d(channels, inner, 4, 2, 1, bias=False)
        below = inner if submodule is None else 2 * inner
        if outermost:
            up = [nn.ReLU(True), nn.ConvTranspose2d(below, outer, 4, 2, 1), nn.Tanh()]
            layers = [downconv, submodule, *up]
        else:
            down = [nn.LeakyReLU(0.2, True), downconv]
            upconv = nn.ConvTranspose2d(below, outer, 4, 2, 1, bias=False)
            up = [nn.ReLU(True), upconv, nn.BatchNorm2d(outer)]
            middle = [] if submodule is None else [nn.BatchNorm2d(inner), submodule]
            layers = [*down, *middle, *up, *([nn.Dropout(0.5)] if dropout else [])]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


def unet(width=16):
    """32x32 to 32x32 by way of 1x1."""
    block = UnetBlock(2 * width, 2 * width)
    block = UnetBlock(2 * width, 2 * width, block, dropout=True)
    block = UnetBlock(2 * width, 2 * width, block)
    block = UnetBlock(width, 2 * width, block)
    return UnetBlock(3, width, block, outermost=True)


def patch_gan(width=16):
    return nn.Sequential(
        nn.Conv2d(6, width, 4, 2, 1),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(2 * width, 4 * width, 4, 1, 1, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(4 * width, 1, 4, 1, 1),
    )


def outlines(images):
    """What pix2pix is given: where it is brighter than half, in three channels."""
    return (images.amax(1, keepdim=True) > 0).float().expand(-1, 3, -1, -1) * 2 - 1


def pix2pix(run):
    netG, netD = unet().to(run.device), patch_gan().to(run.device)
    for net in (netG, netD):
        net.apply(weights_init)
        run.fuse(net)
    criterion_gan, criterion_l1 = nn.BCEWithLogitsLoss(), nn.L1Loss()
    optimizer_G = torch.optim.Adam(netG.parameters(), lr=0.0005, betas=(0.5, 0.999))
    optimizer_D = torch.optim.Adam(netD.parameters(), lr=0.0002, betas=(0.5, 0.999))

    def gan_loss(prediction, real):
        return criterion_gan(prediction, torch.full_like(prediction, float(real)))

    for real_B, _ in run.batches():
        real_A = outlines(real_B)
        with run.autocast():
            fake_B = netG(real_A)

        netD.requires_grad_(True)
        optimizer_D.zero_grad()
        with run.autocast():
            loss_fake = gan_loss(netD(torch.cat((real_A, fake_B.detach()), 1)), False)
            loss_real = gan_loss(netD(torch.cat((real_A, real_B), 1)), True)
            loss_D = (loss_fake + loss_real) * 0.5
        run.backward(loss_D)
        run.step(optimizer_D)

        netD.requires_grad_(False)
        optimizer_G.zero_grad()
        with run.autocast():
            loss_G = gan_loss(netD(torch.cat((real_A, fake_B), 1)), True)
            loss_L1 = criterion_l1(fake_B, real_B)
        run.backward(loss_G + 100 * loss_L1)
        run.step(optimizer_G)
        run.log(D=loss_D, G=loss_G, L1=loss_L1)

    real_B, _ = run.held_out()
    real_A = outlines(real_B)
    pair = torch.cat((real_A, real_B), 1)
    with evaluated(netG, netD):
        run.log(eval_L1=criterion_l1(netG(real_A), real_B), eval_D=gan_loss(netD(pair), True))
    return {"netG": (netG, (real_A,)), "netD": (netD, (pair,))}


# --- A VAE ----------------------------------------------------------------------------------------


class VAE(nn.Module):
    def __init__(self, width=32, latent=16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.fc_mu = nn.Linear(width * 16, latent)
        self.fc_logvar = nn.Linear(width * 16, latent)
        self.fc_up = nn.Linear(latent, width * 16)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def encode(self, x):
        h = self.relu(self.conv1(x))
        h = self.relu(self.bn2(self.conv2(h)))
        h = self.relu(self.bn3(self.conv3(h)))
        h = h.view(h.size(0), -1)
        return self.fc_mu(h), self.fc_logvar(h)

    def decode(self, z):
        return self.decoder(self.fc_up(z).view(z.size(0), -1, 4, 4))

    def forward(self, x):
        mu, logvar = self.encode(x)
        z = mu
        if self.training:
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return self.decode(z), mu, logvar


def vae(run):
    model = VAE().to(run.device)
    run.fuse(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def losses(images):
        with run.autocast():
            decoded, mu, logvar = model(images)
        n, mu, logvar = len(images), mu.float(), logvar.float()
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum() / n
        return F.mse_loss(decoded.float(), images, reduction="sum") / n, kl

    for images, _ in run.batches():
        optimizer.zero_grad()
        reconstruction, kl = losses(images)
        run.backward(reconstruction + kl)
        run.step(optimizer)
        run.log(reconstruction=reconstruction, KL=kl)

    images, _ = run.held_out()
    with evaluated(model):
        reconstruction, kl = losses(images)
        run.log(eval_reconstruction=reconstruction, eval_KL=kl)
    return {"model": (model, (images,))}


# --- A class-conditional GAN: conditional BatchNorm and projection --------------------------------


class ConditionalBatchNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Embedding(CLASSES, channels)
        self.bias = nn.Embedding(CLASSES, channels)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x, y):
        return self.gain(y)[:, :, None, None] * self.bn(x) + self.bias(y)[:, :, None, None]


class GeneratorBlock(nn.Module):
    def __init__(self, inputs, outputs, stride=2, padding=1):
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False)
        self.norm = ConditionalBatchNorm(outputs)
        self.activation = nn.ReLU()

    def forward(self, x, y):
        return self.activation(self.norm(self.conv(x), y))


class ConditionalGenerator(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.blocks = nn.ModuleList(
            [GeneratorBlock(nz, width, 1, 0), *(GeneratorBlock(width, width) for _ in range(2))]
        )
        self.last = nn.ConvTranspose2d(width, 3, 4, 2, 1)
        self.tanh = nn.Tanh()

    def forward(self, z, y):
        h = z[:, :, None, None]
        for block in self.blocks:
            h = block(h, y)
        return self.tanh(self.last(h))


class ProjectionDiscriminator(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(3, width, 4, 2, 1))
        self.conv2 = spectral_norm(nn.Conv2d(width, width, 4, 2, 1))
        self.conv3 = spectral_norm(nn.Conv2d(width, width, 4, 2, 1))
        self.activation = nn.LeakyReLU(0.1)
        self.linear = spectral_norm(nn.Linear(width, 1))
        self.embed = spectral_norm(nn.Embedding(CLASSES, width))

    def forward(self, x, y):
        h = self.activation(self.conv1(x))
        h = self.activation(self.conv2(h))
        h = self.activation(self.conv3(h))
        h = h.sum((2, 3))
        return self.linear(h).squeeze(1) + (self.embed(y) * h).sum(1)


def projection(run):
    generator = ConditionalGenerator().to(run.device)
    discriminator = ProjectionDiscriminator().to(run.device)
    run.fuse(generator)
    run.fuse(discriminator)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.9))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.9))
    z_shown = torch.randn(64, nz, device=run.device)

    for real, classes in run.batches():
        z = torch.randn(BATCH, nz, device=run.device)
        with run.autocast():
            fake = generator(z, classes)
            score_real = discriminator(real, classes)
            score_fake = discriminator(fake.detach(), classes)
        loss_d = F.relu(1 - score_real.float()).mean() + F.relu(1 + score_fake.float()).mean()
        optimizer_d.zero_grad()
        run.backward(loss_d)
        run.step(optimizer_d)

        with run.autocast():
            score = discriminator(fake, classes)
        loss_g = -score.float().mean()
        optimizer_g.zero_grad()
        run.backward(loss_g)
        run.step(optimizer_g)
        run.log(D=loss_d, G=loss_g)

    real, classes = run.held_out()
    with evaluated(generator, discriminator):
        images = generator(z_shown, classes)
        run.log(eval_images=moments_error(images, real), eval_D=discriminator(real, classes).mean())
    return {"generator": (generator, (z_shown, classes)), "D": (discriminator, (real, classes))}


# --- A classifier of blocks with attributes -------------------------------------------------------


class DownBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(out + self.bn2(self.conv2(out)))


class Classifier(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.block1 = DownBlock(3, width)
        self.block2 = DownBlock(width, width)
        self.block3 = DownBlock(width, width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


def classifier(run):
    model = Classifier().to(run.device)
    run.fuse(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def loss_of(images, classes):
        with run.autocast():
            return F.cross_entropy(model(noisy(images)), classes)

    for images, classes in run.batches():
        optimizer.zero_grad()
        loss = loss_of(images, classes)
        run.backward(loss)
        run.step(optimizer)
        run.log(cross_entropy=loss)

    images, classes = run.held_out()
    with evaluated(model):
        run.log(eval_cross_entropy=loss_of(images, classes))
    return {"model": (model, (images,))}


# --- CycleGAN: norms of one image, 7x7 and 3x3 kernels --------------------------------------------


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x):
        return x + self.block(x)


def resnet(width=16):
    return nn.Sequential(
        nn.ReflectionPad2d(3),
        nn.Conv2d(3, width, 7),
        nn.InstanceNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.InstanceNorm2d(2 * width),
        nn.ReLU(inplace=True),
        ResidualBlock(2 * width),
        ResidualBlock(2 * width),
        nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1),
        nn.InstanceNorm2d(width),
        nn.ReLU(inplace=True),
        nn.ReflectionPad2d(3),
        nn.Conv2d(width, 3, 7),
        nn.Tanh(),
    )


def image_critic(width=16):
    return nn.Sequential(
        nn.Conv2d(3, width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.InstanceNorm2d(2 * width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.ZeroPad2d((1, 0, 1, 0)),
        nn.Conv2d(2 * width, 1, 4, padding=1),
    )


def cyclegan(run):
    G_AB, G_BA, D_A, D_B = (net().to(run.device) for net in (resnet,) * 2 + (image_critic,) * 2)
    for net in (G_AB, G_BA, D_A, D_B):
        run.fuse(net)
    optimizer_G = torch.optim.Adam(
        [*G_AB.parameters(), *G_BA.parameters()], lr=2e-4, betas=(0.5, 0.999)
    )
    optimizer_D = torch.optim.Adam(
        [*D_A.parameters(), *D_B.parameters()], lr=2e-4, betas=(0.5, 0.999)
    )

    def gan(prediction, real):
        return F.mse_loss(prediction.float(), torch.full_like(prediction, float(real)).float())

    for images, _ in run.batches():
        real_A, real_B = images[:4], -images[4:8]  # other images, in other colours
        with run.autocast():
            fake_B, fake_A = G_AB(real_A), G_BA(real_B)
            cycle = F.l1_loss(G_BA(fake_B), real_A) + F.l1_loss(G_AB(fake_A), real_B)
            loss_G = gan(D_B(fake_B), True) + gan(D_A(fake_A), True)
        optimizer_G.zero_grad()
        run.backward(loss_G + 10 * cycle)
        run.step(optimizer_G)

        with run.autocast():
            pairs = (D_A, real_A, fake_A), (D_B, real_B, fake_B)
            losses = [gan(D(real), True) + gan(D(fake.detach()), False) for D, real, fake in pairs]
        optimizer_D.zero_grad()
        run.backward(0.5 * sum(losses))
        run.step(optimizer_D)
        run.log(D=sum(losses), G=loss_G, cycle=cycle)

    real_A, _ = run.held_out()
    with evaluated(G_AB, G_BA, D_A, D_B):
        run.log(eval_cycle=F.l1_loss(G_BA(G_AB(real_A)), real_A), eval_D=gan(D_A(real_A), True))
    return {"G": (G_AB, (real_A,)), "D": (D_A, (real_A,))}


# --- SNGAN: a critic of 3x3 and 4x4 kernels under spectral normalisation --------------------------


def sn_critic(width=32):
    layers = []
    for i, (inputs, outputs, kernel, stride) in enumerate(
        [(3, 1, 3, 1), (1, 1, 4, 2), (1, 2, 3, 1), (2, 2, 4, 2), (2, 4, 3, 1)]
    ):
        channels = width * inputs if i else inputs
        conv = nn.Conv2d(channels, width * outputs, kernel, stride, padding=1)
        layers += [spectral_norm(conv), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(4 * width * 8 * 8, 1)))


def sngan(run):
    netG, netD = Generator().to(run.device), sn_critic().to(run.device)
    netG.apply(weights_init)
    run.fuse(netG)
    run.fuse(netD)
    optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-4, betas=(0.5, 0.999))
    fixed_noise = torch.randn(64, nz, 1, 1, device=run.device)

    for real, _ in run.batches():
        noise = torch.randn(BATCH, nz, 1, 1, device=run.device)
        with run.autocast():
            fake = netG(noise)
            score_real, score_fake = netD(real), netD(fake.detach())
        loss_d = F.relu(1 - score_real.float()).mean() + F.relu(1 + score_fake.float()).mean()
        optimizerD.zero_grad()
        run.backward(loss_d)
        run.step(optimizerD)

        with run.autocast():
            score = netD(fake)
        loss_g = -score.float().mean()
        optimizerG.zero_grad()
        run.backward(loss_g)
        run.step(optimizerG)
        run.log(D=loss_d, G=loss_g)

    real, _ = run.held_out()
    with evaluated(netG, netD):
        images = netG(fixed_noise)
        run.log(eval_images=moments_error(images, real), eval_D=netD(real).mean())
    return {"netG": (netG, (fixed_noise,)), "netD": (netD, (real,))}


def noisy(images):
    """So that 200 steps do not end at a loss of 0."""
    return images + 3 * torch.randn_like(images)


NETS = {net.__name__: net for net in (dcgan, pix2pix, vae, projection, classifier, cyclegan, sngan)}
